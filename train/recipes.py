"""Named, complete sets of constants: ``--recipe NAME`` sets every constant that differs from the script's.

"published" changes nothing, because the scripts have the settings of the published run, for a GPU. Each network of
``weights/`` has the recipe that made it, under its name.
"""

from settings import Recipes

_SMALL = {  # common to short trainings of networks that predict the clean image
    "ADAM_BETA2": 0.99,
    "TIME_SAMPLING": "logit_normal",
    "EMA_UPDATE_EVERY": 1,
    "CFG_SCALE": 1.0,
}
_COMPONENTS = _SMALL | {
    "MODEL_SIZE": "ComponentMLP-512",
    "BATCH_SIZE": 256,
    "LEARNING_RATE": 1.5e-3,
    "WARMUP_EPOCHS": 0.5,
    "TIME_MEDIAN": 0.3,
    "TIME_WIDTH": 2.0,
    "EMA_BETA": 0.9995,
    "NUM_ODE_STEPS": 8,
    "SOLVER": "multistep",
    "TIME_GRID": "logit",
    "TOLERANCE": 0.04,
    "AMP_DTYPE": "bfloat16",
}
_SUBHALOES = tuple(f"subhalo_{what}_{i}" for i in range(1, 11) for what in ("mass", "x", "y"))  # the ten heaviest
_OF_MODEL_II = ("source_x", "source_y", "axion_mass:log10", "vortex_angle:angle/2", "subhalo_mass_total", *_SUBHALOES)
_CLASSIFIER = {"IMAGE_SIZE": 64, "BATCH_SIZE": 64, "PRETRAINED": False}  # from scratch, on a CPU

RECIPES: Recipes = {
    "published": {"train_diffusion": {}, "train_classifier": {}, "train_regressor": {}, "export_weights": {}},
    # Both networks in ten minutes on two cores, from 12,000 images
    "first_look": {
        "train_diffusion": _SMALL
        | {
            "MODEL_SIZE": "NanoDiT-S/16",
            "BATCH_SIZE": 16,
            "LEARNING_RATE": 2e-3,
            "EPOCHS": 8,
            "WARMUP_EPOCHS": 0.2,
            "EMA_BETA": 0.999,
            "NUM_ODE_STEPS": 20,
            "SAMPLE_INTERVAL": 1,
            "CHECKPOINT_SAVE_INTERVAL": 1,
        },
        "train_classifier": _CLASSIFIER | {"IMAGE_SIZE": 48, "EPOCHS": 4},
    },
    # For any images, with or without noise: each network takes an hour on two cores, from 15,000 images of 64 pixels
    "hour": {
        "train_diffusion": _COMPONENTS
        | {
            "MODEL_SIZE": "ComponentMLP-1024",
            "EPOCHS": 500,
            "NUM_ODE_STEPS": 12,
            "FIRST_TIME": 0.95,
            "LAST_TIME": 0.01,
            "SAMPLE_INTERVAL": 100,
            "CHECKPOINT_SAVE_INTERVAL": 100,
        },
        "train_classifier": _CLASSIFIER | {"EPOCHS": 12},
    },
    # weights/component_mlp.safetensors: an hour on two cores, from 90,000 images
    "component_mlp": {
        "train_diffusion": _COMPONENTS | {"EPOCHS": 400},
        "export_weights": {"HALVED": "codec.vectors", "OUTPUT_PATH": "weights/component_mlp.safetensors"},
    },
    # A network like weights/conditional_mlp.safetensors, which was made in several parts (see its card): component_mlp,
    # trained further on 270,000 images with their parameters
    "conditional_mlp": {
        "train_diffusion": _COMPONENTS
        | {
            "EPOCHS": 420,
            "START_PATH": "weights/component_mlp.safetensors",
            "PARAMETERS": _OF_MODEL_II,
            "NUM_ODE_STEPS": 4,
            "TOLERANCE": 0.08,
        },
        "export_weights": {"HALVED": "*", "OUTPUT_PATH": "weights/conditional_mlp.safetensors"},
    },
    # weights/resnet18_lens.safetensors: 40 minutes on two cores, from 18,000 images
    "resnet18_lens": {
        "train_classifier": _CLASSIFIER | {"EPOCHS": 12},
        "export_weights": {
            "CHECKPOINT_PATH": "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt",
            "HALVED": "*",
            "OUTPUT_PATH": "weights/resnet18_lens.safetensors",
        },
    },
    # weights/resnet18_observed.safetensors: two and a half hours on a busy core, from 90,000 images
    "resnet18_observed": {
        "train_classifier": _CLASSIFIER
        | {
            "EPOCHS": 12,
            "AMP_DTYPE": "bfloat16",
            "AUGMENT": "half_turn",
            "MAX_SHIFT": 2,
            "INSTRUMENT": "euclid",
            "UNLIKE_SHARE": 0.25,
        },
        "export_weights": {
            "CHECKPOINT_PATH": "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt",
            "HALVED": "layer[34]*weight",
            "OUTPUT_PATH": "weights/resnet18_observed.safetensors",
        },
    },
    # weights/resnet18_sharp.safetensors: an hour on two cores, from 180,000 images
    "resnet18_sharp": {
        "train_classifier": _CLASSIFIER | {"EPOCHS": 10, "AMP_DTYPE": "bfloat16"},
        "export_weights": {
            "CHECKPOINT_PATH": "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt",
            "HALVED": "layer[34]*weight",
            "OUTPUT_PATH": "weights/resnet18_sharp.safetensors",
        },
    },
    # weights/resnet18_regressor.safetensors: from 90,000 images
    "resnet18_regressor": {
        "train_regressor": {"PARAMETERS": _OF_MODEL_II[:5], "EPOCHS": 6, "AMP_DTYPE": "bfloat16"},
        "export_weights": {
            "CHECKPOINT_PATH": "regressor_training_resnet18/regressor_ckpts/resnet18_best.pt",
            "HALVED": "layer[34]*weight",
            "OUTPUT_PATH": "weights/resnet18_regressor.safetensors",
        },
    },
}
