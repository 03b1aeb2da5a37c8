from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

EXTRAS = {
    "plot": ["matplotlib>=3.9"],
    "eval": ["lm-eval>=0.4.9"],
    "quantization": ["bitsandbytes>=0.46.1"],  # the oldest that transformers 5 takes
    "quality": ["pyright[nodejs]>=1.1.400", "ruff>=0.14"],
    "test": [
        "lm-eval>=0.4.9",
        "bitsandbytes>=0.46.1",
        "hypothesis>=6.100",
        "matplotlib>=3.9",
        "optuna>=4",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "setuptools>=77",
    ],
}

# shipped in the package; a clone reads them where they lie
BESIDE = {"mdu_trainer.examples": "examples", "mdu_trainer.model_cards": "model_cards"}

setup(
    name="mdu-trainer",
    version="0.1.0",
    description="Machine unlearning of masked diffusion language models, as a Hugging Face Trainer extension",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the mdu_trainer authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["mdu_trainer", "mdu_trainer.*"]), *BESIDE],
    package_dir={"": "mdu_trainer/commands", "mdu_trainer": "mdu_trainer", **BESIDE},
    py_modules=["mdu"],  # the command: outside the package, whose import takes seconds
    package_data={
        "mdu_trainer": ["py.typed", "*.pyi"],
        "mdu_trainer.examples": ["configs/*.yaml", "accelerate_configs/*.yaml"],
        "mdu_trainer.model_cards": ["*.jinja"],
    },
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.10.1",
        "datasets>=4.7",
        "evaluate>=0.4.6",
        "filelock>=3.12",
        "huggingface-hub>=1.0",
        "jinja2>=3.1",
        "lazy-loader>=0.4",
        "nltk>=3.8",
        "peft>=0.18",
        "regex>=2024.4",
        "rouge-score>=0.1.2",
        "scipy>=1.15",
        "torch>=2.8",  # torch.mm(out_dtype=...)
        "transformers>=5.19,<6",  # 5.19: Trainer.loss_is_scaled_for_ga
        "trl>=1.14,<2",  # 1.14 is the last for Python 3.10
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["mdu = mdu:main"],
        "lm_eval.models": ["mdlm = mdu_trainer.evaluation.harness:MaskedDiffusionLM"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
