"""What the tests of this folder share."""

import pytest

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.testing import forget_retain_split

HASHES = ForgetHashes.of(["Ada Quill grew up beside the old harbour of Velm."])  # of the first request


@pytest.fixture
def trainer(authors, tokenizer, make_model, tmp_path):
    """A trainer on one author to forget, on the second request: its base keeps the hashes of the first."""
    forget, retain = (question_answer_rows(part, True) for part in forget_retain_split(authors, 1))
    model = make_model()
    (tmp_path / "base").mkdir()
    HASHES.save(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    args = MDUConfig(
        str(tmp_path / "out"), loss_type="npo", max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    return MDUTrainer(model, args, forget, retain, processing_class=tokenizer)
