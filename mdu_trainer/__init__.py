"""Machine unlearning of masked diffusion language models, as a Hugging Face Trainer extension."""

import lazy_loader

from . import models as models  # registers LLaDA and Dream with transformers' Auto classes

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/commands")  # so that users type `python -m mdu_trainer.leak_check`

# The public names stand in `__init__.pyi`. Each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
