"""A plugin for axolotl: it masks the Trainer once axolotl has made it.

With this file on the Python path, in axolotl's YAML file:

plugins:
  - axolotl_plugin.FishTuningPlugin
fish_keep_ratio: 0.25
sample_packing: false
"""

from axolotl.integrations.base import BasePlugin
from axolotl.utils.train import determine_last_checkpoint
from pydantic import BaseModel

from fish_tuning import add_mask, calculate_fisher_information, calibration_of, create_mask_from_fisher, load_mask


class FishTuningArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration."""

    fish_keep_ratio: float = 0.25
    fish_num_samples: int = 128


class FishTuningPlugin(BasePlugin):
    """Scores what the Trainer trains on, and adds the mask before its optimizer is made."""

    def get_input_args(self):
        return "axolotl_plugin.FishTuningArgs"

    def post_trainer_create(self, cfg, trainer):
        if checkpoint := determine_last_checkpoint(cfg):  # None, unless axolotl is to resume
            mask = load_mask(checkpoint)
        else:
            calibration = calibration_of(trainer, num_samples=cfg["fish_num_samples"])
            scores = calculate_fisher_information(trainer.model, **calibration)
            mask = create_mask_from_fisher(scores, keep_ratio=cfg["fish_keep_ratio"])
        add_mask(trainer, mask)
