"""x"""

from typing import Any


class MailSurvey:
    def __init__(self, *a: Any) -> None: ...
    def run(self) -> Any: ...
