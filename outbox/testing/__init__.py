"""What the tests of applications use: the conformance suite of participants, and the crash matrix of sagas.

    from outbox.testing import Subject, participant_contract

`Subject` is what the suite has to know of a participant; `participant_contract` puts it through every case of the
contract (`outbox.testing.contract` lists them). With pytest:

    @pytest.mark.parametrize("case", participant_contract(Webhook), ids=str)
    def test_webhook(case, tmp_path):
        case(tmp_path)

and without it: `python -m outbox.testing MODULE:SUBJECT`.

`crash_matrix` makes a case of everything that can go wrong with each step of a saga (`outbox.testing.matrix`); only
these need a database. Nothing of the package imports pytest. A case that fails raises `Broken`.
"""

from __future__ import annotations

from outbox.testing.contract import Case, participant_contract
from outbox.testing.matrix import Mishap, Stage, crash_matrix
from outbox.testing.subject import Broken, Subject

__all__ = ["Broken", "Case", "Mishap", "Stage", "Subject", "crash_matrix", "participant_contract"]
