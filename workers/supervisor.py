"""supervisord: which programs it runs, its configuration files, and talking to a running one.

Each worker program is described once (`workers`), for the embedded stack and for production alike. Called by
`workers.stack` and by `outbox supervisor-config`. Nothing here is durable: the functions return text, and
`Supervisor` asks a running supervisord over its unix socket.

A worker that ends is started again, always and for ever: a database that is down for a week must not leave
a program in supervisord's state FATAL, in which nobody starts it again.

Errors: `NotReady` when a path can't be written into a configuration; `Unanswered` when supervisord is not
there; `NotReady` with supervisord's own word when it refuses.
"""

from __future__ import annotations

import http.client
import re
import shlex
import socket
import sys
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from outbox.errors import NotReady
from workers.postgres import Postgres

CONTROL_SOCKET = "ctl.sock"
"""supervisord binds this name plus `.PID` first, so it is short: paths of sockets end at 107 bytes."""

MAIL_SOCKET = "smtp.sock"

SERVERS = ("postgres", "mailserver")
"""What the embedded stack brings itself and a production host has elsewhere."""

WORKERS = ("clock", "index", "blob", "mail", "saga", "actors", "relay")

#: Those that import the application's modules.
_OF_APPLICATION = ("saga", "actors")

ACTORS_WAIT = 600
"""Seconds for actors to finish: dramatiq's own limit."""

_FOR_EVER = 1_000_000_000

#: What a value of the configuration can't have in it.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\"]|\s[;#]")

_CONTROL = """[unix_http_server]
file={socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{socket}
"""

_EMBEDDED = """; Written by `outbox up`, each time anew. Paths are relative to this file's directory.
{control}
[supervisord]
{user}logfile=log/supervisord.log
logfile_maxbytes=10MB
logfile_backups=3
pidfile=supervisord.pid
childlogdir=log
nocleanup=true
umask=077

{programs}"""

_PRODUCTION = """; supervisord runs the outbox's workers. Written by `outbox supervisor-config`.
;
; Use it as it is (supervisord -n -c FILE), or copy [program:…] into your own supervisord's conf.d and the
; environment with it. The user {user} must own {directory} and {directory}/log before it starts.
; `{command}` is looked up on supervisord's PATH: in a virtual environment, write its full path
; (outbox supervisor-config --command /path/to/bin/outbox).

{control}
[supervisord]
; Nothing runs as root: supervisord itself gives its rights up before it opens a file in {directory}.
user={user}
logfile={directory}/log/supervisord.log
pidfile={directory}/supervisord.pid
umask=027
; Where the participants are. A percent sign in these values is written %%%% (four of them).
;   OUTBOX_DATABASE       what the workers connect as: a member of the role outbox_worker. Leave the password
;                         to ~/.pgpass of {user} (HOME below), a service file or peer authentication.
;   OUTBOX_INDEX          directory of the Xapian index; the applications that search read it.
;   OUTBOX_BLOBS          directory of the blob store, or s3://BUCKET/PREFIX; the applications stage their files in it.
;   OUTBOX_SMTP           smtp://HOST:PORT or unix:/path/to/socket; smtps://USER@HOST and smtp+starttls://USER@HOST
;                         with the password in a file that OUTBOX_SMTP_PASSWORD_FILE names.
;   OUTBOX_MAIL_EVIDENCE  postfix:/etc/postfix (its log and queue say whether a mail was taken), maildir:/path,
;                         receipt:receipt@example.org (mails come back), or none (a mail in doubt is sent again).
;   OUTBOX_MAIL_DOMAIN    domain of Message-IDs and envelope senders: one whose mail comes back to you.
;   OUTBOX_ACTORS         modules that declare actors of dramatiq: package.module[,...].
;   OUTBOX_ACTOR_DATABASE what their workers connect as: a member of outbox_actor and of the application's role.
;   OUTBOX_RELAY          amqps://USER:PASSWORD@HOST/VHOST or rediss://HOST: the broker that queues of actors are
;                         relayed to. With a password in it, let nobody else read this file.
;   OUTBOX_RELAY_QUEUES   the queues that are relayed: name[,...].
;   OUTBOX_TTL            seconds of a lane's lease: after so long another worker takes over from a dead one.
;   OUTBOX_SCRUB_EVERY    how often all that the participants hold is compared with the log.
;   OUTBOX_SCRUB_RATE     bytes of blobs a second, or else items, that this may read.
environment=
    HOME="{quoted}",
    PYTHONUNBUFFERED="1",
    OUTBOX_DATABASE="postgresql://outbox_worker@localhost/app",
    OUTBOX_INDEX="{quoted}/index",
    OUTBOX_BLOBS="{quoted}/blobs",
    OUTBOX_SMTP="smtp://127.0.0.1:25",
    OUTBOX_MAIL_EVIDENCE="none",
    OUTBOX_MAIL_DOMAIN="outbox.invalid",
    OUTBOX_TTL="15",
    OUTBOX_SCRUB_EVERY="7d",
    OUTBOX_SCRUB_RATE="20000000"

{programs}"""

_PROGRAM = """[program:{name}]
command={command}
{optional}priority={priority}
autostart={autostart}
autorestart=true
startsecs=1
startretries={retries}
stopsignal={signal}
stopwaitsecs={wait}
killasgroup=true
redirect_stderr=true
stdout_logfile={logs}/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""


class Program(NamedTuple):
    """One program that supervisord runs."""

    name: str
    command: tuple[str, ...]
    #: Low numbers start first and stop last.
    priority: int = 100
    #: The system user that it runs as, or None for supervisord's own.
    user: str | None = None
    directory: str | None = None
    autostart: bool = True
    stopsignal: str = "TERM"
    #: Seconds between the signal and SIGKILL; a worker drains in them.
    stopwaitsecs: int = 30


def servers(state: Path, sockets: Path, postgres: Postgres) -> list[Program]:
    """The servers of the embedded stack."""
    listen = f"unix:{sockets / MAIL_SOCKET}"
    mailserver = (*_python("workers.mailserver"), "--maildir", str(state / "mail"), "--listen", listen)
    return [
        # INT is Postgres's fast shutdown; TERM would wait for the applications to go.
        Program("postgres", tuple(postgres.command), 10, postgres.user, stopsignal="INT", stopwaitsecs=60),
        Program("mailserver", mailserver, 20),
    ]


def workers(
    outbox: Sequence[str] = (),
    *,
    user: str | None = None,
    directory: str | None = None,
    autostart: bool = True,
    lanes: Mapping[str, int] | None = None,
    actors_wait: int = ACTORS_WAIT,
) -> list[Program]:
    """The programs that drain the log. `outbox` is the command to run, by default this Python's.

    A participant in `lanes` gets a program for each of its lanes; others get one that drains all they have.
    """
    command = outbox or _python("outbox")
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in WORKERS}
    for target, count in (lanes or {}).items():
        del names[target]
        names |= {f"{target}-{lane}": (target, "--lane", str(lane)) for lane in range(count)}
    return [
        # What an actor has begun is finished, which may take longer than a batch.
        Program(
            name, (*command, "work", *words), 100, user, directory, autostart,
            stopwaitsecs=actors_wait if name == "actors" else 30,
        )
        for name, words in names.items()
    ]  # fmt: skip


def _python(module: str) -> tuple[str, ...]:
    # -P: a file `json.py` in the directory where supervisord runs is not a module of ours.
    return (sys.executable, "-P", "-m", module)


def embedded(
    state: Path, sockets: Path, postgres: Postgres, *, home: Path, actors: bool = False, relay: bool = False
) -> str:
    """The configuration of the embedded stack. Only the servers start by themselves: the workers need a schema.
    `home`: where the application's modules are looked for, unless its name can't stand there. `actors`, `relay`:
    whether any are configured."""
    wanted = {"actors": actors, "relay": relay}
    modules = None if _UNFIT.search(str(home)) else str(home)
    programs = servers(state, sockets, postgres) + [
        program._replace(directory=modules) if program.name in _OF_APPLICATION else program
        for program in workers(autostart=False, actors_wait=30)
        if wanted.get(program.name, True)
    ]
    return _EMBEDDED.format(
        control=_CONTROL.format(socket=_value(f"{sockets / CONTROL_SOCKET}")),
        # Without it, supervisord warns root that it keeps root's rights.
        user="user=root\n" if postgres.user else "",
        programs="\n".join(section(program, "log") for program in programs),
    )


def production(user: str, directory: str, command: str, lanes: Mapping[str, int] | None = None) -> str:
    """A configuration for workers whose Postgres and mail server are run by others; `lanes` as for `workers`."""
    if not directory.startswith("/"):
        raise NotReady(f"{directory!r} is not an absolute path: give --directory from the root on")
    home = directory.rstrip("/")
    words = shlex.split(command)
    programs = workers(words, user=user, directory=home, lanes=lanes)
    # Last, so that nothing waits for it; it may be in the middle of a large blob when it is told to stop.
    programs.append(Program("scrub", (*words, "scrub", "--scheduled"), 200, user, home))
    return _PRODUCTION.format(
        control=_CONTROL.format(socket=_value(f"{home}/supervisor.sock")),
        user=_value(user),
        directory=_value(home),
        # supervisord's own `environment` is expanded twice.
        quoted=_value(home, expansions=2),
        command=_value(command),
        programs="\n".join(section(program, f"{home}/log") for program in programs),
    )


def section(program: Program, logs: str) -> str:
    """A program's section of the configuration."""
    optional = {"directory": program.directory, "user": program.user}
    return _PROGRAM.format(
        name=program.name,
        command=_command(program.command),
        optional="".join(f"{option}={_value(value)}\n" for option, value in optional.items() if value),
        priority=program.priority,
        autostart="true" if program.autostart else "false",
        retries=_FOR_EVER,
        signal=program.stopsignal,
        wait=program.stopwaitsecs,
        # Names of log files are expanded twice by supervisord, all else once.
        logs=_value(logs, expansions=2),
    )


def _value(text: str, *, expansions: int = 1) -> str:
    if _UNFIT.search(text):
        raise NotReady(f"the path {text!r} can't stand in supervisord's configuration: use one without quotes and ` ;`")
    return text.replace("%", "%" * 2**expansions)


def _command(words: Iterable[str]) -> str:
    line = shlex.join(words)
    if re.search(r"[\x00-\x1f\x7f]", line):
        raise NotReady(f"a path in {line!r} has a control character: supervisord can't run it, use another directory")
    # A ; or # after a space starts a comment even inside quotes: end the quotes between the two and go on.
    return re.sub(r"(\s)([;#])", r"\1''\2", line).replace("%", "%%")


class Unanswered(NotReady):
    """No supervisord answers on the socket."""


class Ending(Unanswered):
    """It stops its programs, and then itself."""


class Refused(NotReady):
    """supervisord understood and said no; the text is its own."""


Phase = Literal["running", "ending", "gone"]


class State(NamedTuple):
    """What supervisord says of a program: `STARTING`, `RUNNING`, `BACKOFF`, `STOPPING`, `EXITED`, `STOPPED`…"""

    name: str
    pid: int | None


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket. A supervisord that doesn't answer for 30 s is stuck."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self.path))
        except OSError:
            self.close()
            raise


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = _Connection(self.path)
        # Where the base class looks for what it has to close.
        self._connection = (host, connection)
        return connection


class Supervisor:
    """A running supervisord, asked over its control socket. Every call returns at once, none waits for a program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(self.path)) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultString.startswith("SHUTDOWN_STATE"):
                raise Ending("supervisord is just ending: wait, then run `outbox up`") from None
            raise Refused(fault.faultString) from None
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise Unanswered(f"supervisord doesn't answer on {self.path} ({error}): run `outbox up`") from error

    def phase(self) -> Phase:
        """Whether it runs, is ending (and answers nothing else), or is gone."""
        try:
            self._call("getState")
        except Ending:
            return "ending"
        except Unanswered:
            return "gone"
        return "running"

    def states(self) -> dict[str, State]:
        """Each program's state, by its name."""
        found = self._call("getAllProcessInfo")
        return {one["name"]: State(one["statename"], one["pid"] or None) for one in found}

    def start(self, program: str) -> None:
        """Start a program, unless it runs."""
        self._tell("startProcess", program, False)

    def stop(self, program: str) -> None:
        """Send a program its stop signal, if it runs; it isn't started again."""
        self._tell("stopProcess", program, False)

    def signal(self, program: str, number: int) -> None:
        """Send a running program a signal. Raises `NotReady` if it doesn't run."""
        self._call("signalProcess", program, str(int(number)))

    def shutdown(self) -> None:
        """Tell supervisord to stop every program, the highest priority number first, and to end."""
        self._tell("shutdown")

    def _tell(self, method: str, *arguments: Any) -> None:
        try:
            self._call(method, *arguments)
        except Refused as refused:
            # What it should become it is already, or it failed to start and is tried again.
            if not str(refused).startswith(("ALREADY_STARTED", "NOT_RUNNING", "SPAWN_ERROR")):
                raise
