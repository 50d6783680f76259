"""What the tests of applications use: the conformance suite of participants.

    from outbox.testing import Subject, participant_contract

`Subject` is what the suite has to know of a participant; `participant_contract` puts it through every case of the
contract (`outbox.testing.contract` lists them). With pytest:

    @pytest.mark.parametrize("case", participant_contract(Webhook), ids=str)
    def test_webhook(case, tmp_path):
        case(tmp_path)

and without it: `python -m outbox.testing MODULE:SUBJECT`.

Nothing of the package needs a database, and nothing imports pytest. A case that fails raises `Broken`.
"""

from __future__ import annotations

from outbox.testing.contract import Case, participant_contract
from outbox.testing.subject import Broken, Subject

__all__ = ["Broken", "Case", "Subject", "participant_contract"]
