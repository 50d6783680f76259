"""The reference says what the code and the schema are: each list is compared with the thing itself, both ways."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psycopg
import pytest

import outbox
from outbox import decision, failpoint, search, status, testing, whereabouts
from outbox.actor import Cron, OutboxBroker, OutboxLimits, OutboxResults, Outcomes
from outbox.aio import AsyncBlobVerbs, AsyncIndexVerbs, AsyncMailVerbs, AsyncOutbox
from outbox.archive import ArchiveDamaged
from outbox.blob import Blob, BlobMissing
from outbox.cli import _parser
from outbox.cli.why import document
from outbox.database import Unreachable
from outbox.errors import OutboxError
from outbox.intent import Intent
from outbox.parked import Reason
from outbox.participant import Verdict
from outbox.position import Position, Token
from outbox.receipt import Record
from outbox.saga.definition import Saga
from outbox.saga.states import SagaState, StepState
from outbox.session import Outbox
from outbox.settings import Settings
from outbox.verbs import BlobVerbs, IndexVerbs, MailVerbs
from tests.docs.pages import DOCS, PAGES, ROOT, blocks, code, prose, read, rows, sections
from workers import process
from workers.demo.report import Report

CLI, PYTHON, TABLES = (DOCS / "reference" / f"{name}.md" for name in ("cli", "python", "tables"))


def sources() -> list[Path]:
    return sorted([*(ROOT / "outbox").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])


# -------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def commands() -> dict[str, argparse.ArgumentParser]:
    parser, _ = _parser(None)
    return dict(nested(parser, ""))


def nested(parser: argparse.ArgumentParser, before: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Commands, and the commands in them, by their words."""
    for action in parser._actions:
        for name, found in action.choices.items() if isinstance(action.choices, dict) else ():
            yield f"{before}{name}", found
            yield from nested(found, f"{before}{name} ")


def words(text: str) -> list[str]:
    return text.split()


def test_each_command_has_its_section_with_its_usage(commands: dict[str, argparse.ArgumentParser]) -> None:
    described = {title.removeprefix("outbox "): text for title, text in sections(CLI, 2).items()}
    assert described.keys() == commands.keys()
    for name, parser in commands.items():
        usage = re.search(r"```text\n(usage: .*?)```", described[name], re.DOTALL)
        assert usage is not None, name
        assert words(usage[1]) == words(parser.format_usage())


def test_options_that_are_named_exist(commands: dict[str, argparse.ArgumentParser]) -> None:
    known = {option for parser in commands.values() for option in parser._option_string_actions} | {"--version"}
    for page in PAGES:
        for command, rest in re.findall(r"\boutbox ([a-z-]+)([^`\n]*)", read(page)):
            command = next((c for w in rest.split()[:1] if (c := f"{command} {w}") in commands), command)  # noqa: PLW2901
            if command in commands:
                for option in re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0]):
                    assert option in commands[command]._option_string_actions, f"{page.name}: {command} {option}"
    assert set(re.findall(r"`(--[a-z-]+)", prose(CLI))) <= known


def test_fields_of_json_are_those_that_are_printed(
    commands: dict[str, argparse.ArgumentParser], admin: psycopg.Connection[Any], worker: psycopg.Connection[Any]
) -> None:
    admin.execute("insert into outbox.parked (id, target, slot, key, reason) values (1, 'index', 1, 'k', 'poison')")
    with psycopg.connect(admin.info.dsn) as writer:
        writer.execute("select outbox.emit('index', 'put', 'k')")
        shown = status.read(worker)
    described = sections(CLI, 3)
    for part, example in (("log", shown.log), *((n, getattr(shown, n)[0]) for n in ("lanes", "parked", "holders"))):
        assert [code(row[0]) for row in rows(described[part])] == list(example), part
    whole = sections(CLI, 2)
    top = rows(whole["outbox status"].split("\n### ")[0])
    assert [code(row[0]) for row in top] == [*(field.name for field in fields(status.Status)), "warnings"]
    hit = next(row[1] for row in rows(whole["outbox search"]) if row[0] == "`hits`")
    assert set(search.Hit._fields) == set(re.findall(r"`(\w+)`", hit))
    assert [code(row[0]) for row in rows(whole["outbox demo"])] == [field.name for field in fields(Report)]
    assert "demo" in commands


def test_fields_of_what_operators_see_are_those_that_are_printed(
    admin: psycopg.Connection[Any], operator: psycopg.Connection[Any]
) -> None:
    row = admin.execute("select outbox.emit('index', 'put', 'k')").fetchone()
    assert row is not None
    admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason) values (%s, 'index', 1, 'k', 'poison')", row
    )
    admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch, evidence) "
        "values (%s, 'index', 1, 'partial', 1, '[\"a part\"]')",
        row,
    )
    described = {title: [code(r[0]) for r in rows(text)] for title, text in sections(CLI, 2).items()}
    (parked,) = decision.find(operator, decision.Choice())
    assert described["outbox parked list"] == list(parked)
    assert described["outbox parked retry"] == list(decision.decide(operator, "retry", row)[0]._fields)
    found = whereabouts.find(operator, row[0])
    shown = document(found, payload=False)
    table = rows(sections(CLI, 2)["outbox why"])
    assert [code(r[0]) for r in table][-len(shown) :] == list(shown)
    for name in ("lane", "receipt"):
        actual = shown[name]
        assert isinstance(actual, dict)
        (text,) = (r[1] for r in table if code(r[0]) == name)
        assert set(re.findall(r"`(\w+)`", text)) == actual.keys()
    states = {state for r in table[: -len(shown)] for state in re.findall(r"`(\w+)`", r[0])}
    assert states == {*get_args(whereabouts.State), *get_args(Reason)}


# -------------------------------------------------------------------------------------------- settings


def test_each_variable_is_documented_and_no_other() -> None:
    documented = {code(row[0]) for row in rows(read(DOCS / "reference/settings.md")) if row[0].startswith("`OUTBOX_")}
    used = {
        word for file in sources() for word in re.findall(r"\bOUTBOX_[A-Z0-9_]+\b", file.read_text(encoding="utf-8"))
    }
    assert documented == used


def test_defaults_of_settings_are_right(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path, env={"OUTBOX_DATABASE": "postgresql://u@h/d"})
    described = {code(row[0]): row[3] for row in rows(read(DOCS / "reference/settings.md")) if len(row) == 4}
    assert code(described["OUTBOX_SMTP"]) == settings.smtp
    assert code(described["OUTBOX_MAIL_EVIDENCE"]) == settings.mail_evidence
    assert code(described["OUTBOX_MAIL_DOMAIN"]) == settings.mail_domain
    assert float(code(described["OUTBOX_TTL"])) == settings.ttl
    assert described["OUTBOX_INDEX"].startswith("none")
    assert described["OUTBOX_BLOBS"].startswith("none")
    assert settings.index is settings.blobs is None


# ---------------------------------------------------------------------------------------------- tables


def test_each_table_and_column_is_documented(admin: psycopg.Connection[Any]) -> None:
    found: dict[str, list[tuple[str, str]]] = {}
    for table, column, kind in admin.execute(
        "select c.relname, a.attname, format_type(a.atttypid, null) from pg_class c join pg_attribute a "
        "on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped "
        "where c.relnamespace = 'outbox'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition "
        "order by c.relname, a.attnum"
    ):
        found.setdefault(f"outbox.{table}", []).append((column, kind))
    described = {title: [(code(row[0]), row[1]) for row in rows(text)] for title, text in sections(TABLES, 3).items()}
    assert described == found


def test_each_function_is_documented(admin: psycopg.Connection[Any]) -> None:
    found = {
        f"outbox.{name}({', '.join(arguments or [])})"
        for name, arguments in admin.execute(
            "select proname, proargnames[1:pronargs] from pg_proc where pronamespace = 'outbox'::regnamespace"
        )
    }
    assert {code(row[0]) for row in rows(sections(TABLES, 2)["Functions"])} == found


# ---------------------------------------------------------------------------------------------- errors


def errors(root: type[BaseException] = OutboxError) -> dict[str, type[BaseException]]:
    """All of the product's own; modules that have some must be imported here."""
    assert {ArchiveDamaged, BlobMissing, Unreachable, search.QueryInvalid}
    found = {root.__name__: root}
    for kind in root.__subclasses__():
        if kind.__module__ in (
            "outbox.errors",
            "outbox.archive",
            "outbox.blob",
            "outbox.database",
            "outbox.search",
        ):
            found |= errors(kind)
    return found


def test_each_error_is_documented_with_what_it_is_a_kind_of() -> None:
    table = [row for row in rows(read(DOCS / "reference/errors.md")) if len(row) == 4]
    described = {code(row[0]): re.findall(r"`(\w+)`", row[1]) for row in table}
    assert described == {name: [base.__name__ for base in kind.__bases__] for name, kind in errors().items()}
    for row in table:
        home = re.search(r"\(`([\w.]+)`\)", row[0])
        assert errors()[code(row[0])].__module__ == (home[1] if home else "outbox.errors")


def test_each_sqlstate_is_documented() -> None:
    schema = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "alembic/versions").glob("*.sql"))
    described = {code(row[0]) for row in rows(read(DOCS / "reference/errors.md")) if row[0].startswith("`OB")}
    assert described == set(re.findall(r"\bOB\d{3}\b", schema))


# ------------------------------------------------------------------------------------------ failpoints


def test_each_failpoint_is_documented_where_it_is() -> None:
    described = {code(row[0]): row[1] for row in rows(read(DOCS / "reference/failpoints.md"))}
    assert tuple(described) == failpoint.NAMES
    for name, place in described.items():
        files = [file for file in sources() if f'hit("{name}")' in file.read_text(encoding="utf-8")]
        assert [str(file.relative_to(ROOT)) for file in files] == re.findall(r"`([^`]+)`", place), name


# ---------------------------------------------------------------------------------------------- Python

SIGNATURES: dict[str, Callable[..., Any]] = {
    "AsyncOutbox": AsyncOutbox.__init__,
    "Outbox": Outbox.__init__,
    "outbox.index.put": IndexVerbs.put,
    "outbox.index.delete": IndexVerbs.delete,
    "outbox.blobs.put": BlobVerbs.put,
    "outbox.blobs.stage": BlobVerbs.stage,
    "outbox.blobs.delete": BlobVerbs.delete,
    "outbox.mail.send": MailVerbs.send,
    "outbox.emit": Outbox.emit,
    "outbox.append": Outbox.append,
    "outbox.about": Outbox.about,
    "outbox.signal": Outbox.signal,
    "OutboxBroker": OutboxBroker.__init__,
    "Cron": Cron.__init__,
    "Outcomes": Outcomes.__init__,
    "broker.using": OutboxBroker.using,
    "broker.transaction": OutboxBroker.transaction,
    "broker.result": OutboxBroker.result,
    "broker.run": OutboxBroker.run,
    "OutboxResults": OutboxResults.__init__,
    "results.get_result": OutboxResults.get_result,
    "OutboxLimits": OutboxLimits.__init__,
    "broker.action": OutboxBroker.action,
    "outbox.cancel": Outbox.cancel,
    "outbox.of": Outbox.of,
    "Saga": Saga.__init__,
    "saga.function": Saga.function,
    "saga.intent": Saga.intent,
    "saga.mail": Saga.mail,
    "saga.signal": Saga.signal,
    "saga.delay": Saga.delay,
    "saga.child": Saga.child,
    "saga.start": Saga.start,
    "saga.state": Saga.state,
    "saga.id_of": Saga.id_of,
    "saga.check": Saga.check,
    "outbox.token": Outbox.token,
    "outbox.wait": Outbox.wait,
    "outbox.committed": Outbox.committed,
    "Settings.load": Settings.load,
    "Intent.make": Intent.make,
    "search": search.search,
    "Index": search.Index.__init__,
    "Index.search": search.Index.search,
    "Index.get": search.Index.get,
    "process.run": process.run,
    "participant_contract": testing.participant_contract,
    "Subject": testing.Subject.__init__,
    "failpoint.hit": failpoint.hit,
}


def arguments(node: ast.arguments) -> list[tuple[str, Any]]:
    """Names and defaults, in order; a star for each kind of argument."""
    missing = [None] * (len(node.args) - len(node.defaults))
    plain = zip(node.args, [*missing, *node.defaults], strict=True)
    named = zip(node.kwonlyargs, node.kw_defaults, strict=True)
    return [
        *((a.arg, ... if d is None else ast.literal_eval(d)) for a, d in plain),
        *([("*", ...)] if node.kwonlyargs else []),
        *((a.arg, ... if d is None else ast.literal_eval(d)) for a, d in named),
        *([(f"**{node.kwarg.arg}", ...)] if node.kwarg else []),
    ]


def written(signature: str) -> list[tuple[str, Any]]:
    (function,) = ast.parse(f"def f{signature}: pass").body
    assert isinstance(function, ast.FunctionDef)
    return arguments(function.args)


def real(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for each in inspect.signature(function).parameters.values():
        if each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and ("*", ...) not in found:
            found.append(("*", ...))
        star = "**" if each.kind is each.VAR_KEYWORD else ""
        found.append((star + each.name, ... if each.default is each.empty else each.default))
    return found


def test_each_signature_is_as_documented() -> None:
    headings = [match for h in sections(PYTHON, 3) if (match := re.fullmatch(r"`([\w.]+)(\(.*\))`", h))]
    assert {match[1] for match in headings} == SIGNATURES.keys()
    for match in headings:
        assert written(match[2]) == real(SIGNATURES[match[1]]), match[1]


def test_each_public_name_is_documented() -> None:
    headings = sections(PYTHON, 2)
    for name in outbox.__all__:
        assert name in headings or f"`{name}`" in headings["Errors"], name
    # Public methods of the verbs.
    for prefix, verbs in (("outbox.index", IndexVerbs), ("outbox.blobs", BlobVerbs), ("outbox.mail", MailVerbs)):
        for name in vars(verbs):
            assert name.startswith("_") or f"`{prefix}.{name}" in read(PYTHON), name
    for name in vars(Outbox):
        assert name.startswith("_") or f"`outbox.{name}" in read(PYTHON), name


@pytest.mark.parametrize(
    ("plain", "awaited", "left_out"),
    [
        # A broker's, and for what `run_sync` runs.
        (Outbox, AsyncOutbox, {"of", "append", "append_now"}),
        (IndexVerbs, AsyncIndexVerbs, set()),
        (BlobVerbs, AsyncBlobVerbs, set()),
        (MailVerbs, AsyncMailVerbs, set()),
    ],
)
def test_each_verb_is_there_to_be_awaited(plain: type, awaited: type, left_out: set[str]) -> None:
    for name, verb in vars(plain).items():
        if name.startswith("_") or name in left_out:
            continue
        if inspect.isfunction(verb):
            assert real(getattr(awaited, name)) == real(verb), name
            assert inspect.iscoroutinefunction(getattr(awaited, name)) == (name not in ("token", "about")), name
        else:
            assert hasattr(awaited, name), name


def test_each_member_of_a_subject_is_documented() -> None:
    table = rows(sections(PYTHON, 3)["`Subject(home)`"])
    described = {name.split("(")[0] for row in table for name in re.findall(r"`([^`]+)`", row[0])}
    members = {name for name in vars(testing.Subject) if not name.startswith("_")}
    assert described == members
    for name in ("put", "undo", "poison", "view"):
        (shown,) = [found for row in table for found in re.findall(rf"`{name}(\(.*?\))`", row[0])]
        assert written(shown) == real(getattr(testing.Subject, name)), name


@pytest.mark.parametrize("kind", [Token, Position, Blob, Intent, search.Hit, search.Results])
def test_each_field_of_a_value_is_documented(kind: Any) -> None:
    text = sections(PYTHON, 2)["Search" if kind in (search.Hit, search.Results) else kind.__name__]
    assert all(f"`{field}`" in text for field in kind._fields)


def test_each_field_of_settings_is_documented() -> None:
    assert all(f"`{field.name}`" in sections(PYTHON, 2)["Settings"] for field in fields(Settings))


# ---------------------------------------------------------------------------------------------- states


def diagram(heading: str) -> set[str]:
    """The states in the picture below a heading."""
    text = sections(DOCS / "explanation/states.md", 2)[heading]
    (picture,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    arrows = re.findall(r"^ *(\S+) --> ([^\s:]+)", picture, re.MULTILINE)
    assert len(arrows) == len(picture.strip().splitlines())
    return {state for arrow in arrows for state in arrow} - {"[*]"}


def check(admin: psycopg.Connection[Any], table: str, column: str) -> set[str]:
    """What the CHECK of a column in the migrated schema allows."""
    found = admin.execute(
        "select pg_get_constraintdef(oid) from pg_constraint where conrelid = %s::regclass and contype = 'c'",
        (f"outbox.{table}",),
    )
    (allowed,) = [text for (text,) in found if text.startswith(f"CHECK (({column} = ANY (ARRAY[")]
    return set(re.findall(r"'(\w+)'", allowed))


def test_states_of_an_intent_are_those_of_code_and_schema(admin: psycopg.Connection[Any]) -> None:
    reasons = check(admin, "parked", "reason")
    assert set(get_args(Reason)) == reasons
    assert {verdict.value for verdict in Verdict} == reasons - {"due", "skipped", "running"} | {"applied"}
    assert diagram("An intent") == reasons | {"logged", "applied"}
    parked = rows(sections(DOCS / "how-to/parked-intents.md", 2)["See them"])
    assert {code(row[0]) for row in parked} == reasons


def test_states_of_a_lane_are_those_of_the_schema(admin: psycopg.Connection[Any]) -> None:
    assert diagram("A lane") == check(admin, "lane", "state")


def test_states_of_a_receipt_are_those_of_code_and_schema(admin: psycopg.Connection[Any]) -> None:
    allowed = check(admin, "receipt", "state")
    assert set(get_args(get_type_hints(Record)["state"])) == allowed
    assert diagram("A receipt") == allowed


def test_states_of_sagas_and_steps_are_those_of_code_and_schema(admin: psycopg.Connection[Any]) -> None:
    for heading, table, kind in (("A saga", "saga", SagaState), ("A step", "saga_step", StepState)):
        assert diagram(heading) == check(admin, table, "state") == {state.value for state in kind}


# ----------------------------------------------------------------------------------- what pages rely on


def test_tests_that_are_named_exist() -> None:
    tests = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    existing = {found for text in tests for found in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = {found for page in PAGES for found in re.findall(r"`(test_\w+)`", read(page))}
    assert named
    assert named - existing == set()


def test_each_promise_has_its_section() -> None:
    titles = [title.split(":")[0] for title in sections(DOCS / "explanation/guarantees.md", 2)]
    assert titles == ["By participant", *(f"I{number}" for number in range(1, 13))]


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        for file in re.findall(r"`((?:outbox|workers|tests|alembic)/[\w./]+)`", prose(page)):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_modules_in_the_architecture_are_all_there_are() -> None:
    text = sections(DOCS / "explanation/architecture.md", 2)["Two packages"]
    named = {found for row in rows(text) for found in re.findall(r"`([\w/]+)`", row[0])}
    exist = {
        entry.stem + ("/" if entry.is_dir() else "")
        for package in ("outbox", "workers")
        for entry in (ROOT / package).iterdir()
        if not entry.name.startswith("_") and (entry.suffix == ".py" or entry.is_dir())
    }
    assert named == exist


def test_diagrams_are_of_a_kind_that_is_known() -> None:
    kinds = {block.text.split()[0] for page in PAGES for block in blocks(page) if block.language == "mermaid"}
    assert kinds == {"flowchart", "stateDiagram-v2"}
