# make demo   installs into .venv, simulates lenses, generates others with the trained network of weights/, evaluates; ends
#             with demo/lenses.png, demo/evaluation/report.html and a table of scores.
# make train-demo   the same with networks trained from scratch on those lenses, in demo/trained. Run it again to go on
#             where it was stopped.
# make test   installs into .venv and runs every test, but for the long versions of some.
# make test-long   runs those: 500 kills of a training, 10,000 damaged files, 20,000 steps. An hour or so.
# make lint   checks style and format.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TRAINED := $(DEMO)/trained

# Both trainings run at once, each with half of the cores: small batches gain little from more
HALF_OF_CORES := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))

.PHONY: demo train-demo demo-data demo-generator demo-classifier test test-long lint clean

demo: demo-data
	$(BIN)/python evaluate/evaluate_fld.py --data_dir $(DEMO)/data --output_dir $(DEMO)/generated_npy \
		--checkpoint_path weights/nanodit_s64.safetensors --classifier_path weights/resnet18_lens.safetensors \
		--figure_path $(DEMO)/lenses.png --report_dir $(DEMO)/evaluation --num_splits 4

train-demo: demo-data
	OMP_NUM_THREADS=$(HALF_OF_CORES) $(MAKE) --no-print-directory -j2 demo-generator demo-classifier
	$(BIN)/python evaluate/evaluate_fld.py --data_dir $(DEMO)/data --output_dir $(TRAINED)/generated_npy \
		--checkpoint_path $(TRAINED)/diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt \
		--classifier_path $(TRAINED)/classifier_training_resnet18/classifier_ckpts/resnet18_best.pt \
		--figure_path $(TRAINED)/lenses.png --report_dir $(TRAINED)/evaluation --num_splits 4

# Seed 1 is that of the images of weights/: none of the test images was seen in training
demo-data: .venv/installed
	$(BIN)/python simulate/simulate_lenses.py --data_dir $(DEMO)/data --num_per_class 4000 --seed 1

demo-generator:
	$(BIN)/python train/train_diffusion.py --data_dir $(DEMO)/data --output_dir $(TRAINED)/diffusion_training \
		--model_size NanoDiT-S/16 --batch_size 16 --learning_rate 2e-3 --adam_beta2 0.99 --epochs 8 \
		--warmup_epochs 0.2 --time_sampling logit_normal --ema_beta 0.999 --ema_update_every 1 \
		--cfg_scale 1 --num_ode_steps 20 --sample_interval 1 --checkpoint_save_interval 1

# Its progress bars go to a file, so that those of the generator stay readable
demo-classifier:
	$(BIN)/python train/train_classifier.py --data_dir $(DEMO)/data --output_dir $(TRAINED)/classifier_training_resnet18 \
		--image_size 48 --batch_size 64 --epochs 4 --pretrained false 2> $(DEMO)/classifier.log \
		|| (tail -n 3 $(DEMO)/classifier.log; exit 1)

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-long: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv $(DEMO)

# uv installs several times faster than pip; where it cannot, pip does
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch and the rest into .venv (5 GB, some minutes)"
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt \
		|| $(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt \
		|| $(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
