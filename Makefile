# make demo   installs into .venv, simulates lenses, generates lenses with the trained network of weights/, evaluates
#             these. Writes demo/lenses.png and demo/evaluation/report.html, and prints a table of scores.
# make train-demo   does the same in demo/trained, with networks that it trains from scratch on the simulated lenses.
#             Run it again to resume a stopped training.
# make test   installs into .venv and runs every test, except the long versions of some tests.
# make test-long   runs these long versions: 500 kills of a training, 10,000 damaged files, 20,000 training steps, and
#             more. They take about an hour.
# make gpu-reference   trains NanoDiT-B/2 and NanoDiT-S/8 on one GPU, for 12 minutes in all, and measures how good they
#             are. Writes gpu_reference/reference.json. It uses the Python of PYTHON, which must have torch for the GPU.
# make lint   checks style and format.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TRAINED := $(DEMO)/trained
GENERATOR := $(TRAINED)/diffusion_training/dit_conditional_ckpts
CLASSIFIER := $(TRAINED)/classifier_training_resnet18/classifier_ckpts
SCORED = --data_dir $(DEMO)/data --output_dir $(1)/generated_npy --figure_path $(1)/lenses.png --report_dir $(1)/evaluation

# Both trainings run at once, each on half of the cores: with more cores, small batches are hardly faster
HALF_OF_CORES := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))

.PHONY: demo train-demo demo-data demo-generator demo-classifier gpu-reference test test-long lint clean

demo: demo-data
	$(BIN)/python evaluate/evaluate_fld.py $(call SCORED,$(DEMO)) --num_splits 4 \
		--checkpoint_path weights/conditional_mlp.safetensors --classifier_path weights/resnet18_lens.safetensors

train-demo: demo-data
	OMP_NUM_THREADS=$(HALF_OF_CORES) $(MAKE) --no-print-directory -j2 demo-generator demo-classifier
	$(BIN)/python evaluate/evaluate_fld.py $(call SCORED,$(TRAINED)) --num_splits 4 \
		--checkpoint_path $(GENERATOR)/dit_conditional_final.pt --classifier_path $(CLASSIFIER)/resnet18_best.pt

# The training images of weights/ have seed 1, too, and an image keeps its split: test images were not seen in training
demo-data: .venv/installed
	$(BIN)/python simulate/simulate_lenses.py --data_dir $(DEMO)/data --num_per_class 4000 --seed 1

demo-generator:
	$(BIN)/python train/train_diffusion.py --recipe first_look \
		--data_dir $(DEMO)/data --output_dir $(TRAINED)/diffusion_training

# The progress bars of this training go to a file, so that those of the generator stay readable
demo-classifier:
	$(BIN)/python train/train_classifier.py --recipe first_look --data_dir $(DEMO)/data \
		--output_dir $(TRAINED)/classifier_training_resnet18 2> $(DEMO)/classifier.log || (tail -n 3 $(DEMO)/classifier.log; exit 1)

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

gpu-reference:
	$(PYTHON) evaluate/gpu_reference.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv $(DEMO)

# uv installs several times faster than pip; if uv fails, pip installs
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch and the rest into .venv (5 GB, some minutes)"
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt \
		|| $(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements-dev.txt \
		|| $(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
