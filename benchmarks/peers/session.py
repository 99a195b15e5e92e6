"""A whole run: everything is made first, then engines of one kind are started, checked and measured together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.files import Made, Workshop
from benchmarks.peers.measure import Asked, DecoderTest, Result, Test, VitTest, take_turns
from benchmarks.peers.process import Worker
from benchmarks.peers.table import OURS, REFERENCES, Engine
from benchmarks.peers.venvs import Gap, peer_environment
from benchmarks.peers.weights import PICTURES
from seed_story.bundle import TOKENIZER, Bundle
from seed_story.errors import SeedStoryError
from seed_story.tokenizer import StoryTokenizer

SERVE = Path(__file__).parents[1] / "workers" / "serve.py"


@dataclass(frozen=True)
class Setting:
    """What all engines have in common.

    Args:
        bundles: this project's, by recipe: `float32`, `int8`, `int4`; made with `--checkpoint none`.
        depth: tokens that are read at once, and are in the cache when single ones are decoded.
        steps, repeats: single tokens, and looks at a picture, in one turn.
        rounds: turns that count; one before them doesn't.
        patience: seconds that an engine may take to start, and for a turn.
    """

    bundles: Mapping[str, Path]
    threads: int = 2
    depth: int = 512
    steps: int = 24
    repeats: int = 5
    rounds: int = 20
    patience: float = 300

    @property
    def slots(self) -> int:
        """Tokens that a peer's cache has room for."""
        return -(-(self.depth + self.steps + 8) // 64) * 64

    def words(self, scratch: Path) -> dict[str, object]:
        """What an engine's arguments may name."""
        return {
            **{r: path.absolute() for r, path in self.bundles.items()},
            "threads": self.threads,
            "slots": self.slots,
            "scratch": scratch,
        }


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Args:
        engines: ours first.
        commands: how each engine that can be started is started, and each reference, by key.
        results: of each engine, by key; those that can't be started have a gap already.
    """

    engines: Sequence[Engine]
    commands: Mapping[str, Sequence[str]]
    results: dict[str, Result]


def make_plan(peers: Sequence[Engine], setting: Setting, workshop: Workshop, scratch: Path) -> Plan:
    """Installs and makes all that the peers need, and those of this project's engines that they are compared with.

    Args:
        scratch: a folder that lives as long as the plan.

    Raises:
        SeedStoryError: this project's own part fails.
    """
    wanted = {key for peer in peers for key in peer.ours}
    engines = [*(ours for ours in OURS if ours.key in wanted), *peers]
    kinds = {engine.kind for engine in peers}
    references = [reference for kind, reference in REFERENCES.items() if kind in kinds]
    commands: dict[str, Sequence[str]] = {}
    plan = Plan(engines, commands, {engine.key: Result() for engine in engines})
    for engine in (*references, *engines):
        try:
            commands[engine.key] = command(engine, setting, workshop, scratch)
        except Gap as gap:
            if not engine.ours:
                raise _own_failure(engine, gap) from gap
            plan.results[engine.key].fail(gap)
    return plan


def run(plan: Plan, setting: Setting, scratch: Path, say: Callable[[str], None]) -> None:
    """Measures what was prepared; each kind of engine for itself. A peer that fails is a gap in the plan's results.

    Raises:
        SeedStoryError: this project's own part fails.
    """
    for kind, reference in REFERENCES.items():
        here = [engine for engine in plan.engines if engine.kind == kind and engine.key in plan.commands]
        if any(engine.ours for engine in here):
            _meet(_test(kind, setting, scratch), reference, here, plan, setting, say)
    for engine in plan.engines:
        if not engine.ours and plan.results[engine.key].gap:
            raise _own_failure(engine, plan.results[engine.key].gap)


def _test(kind: str, setting: Setting, scratch: Path) -> Test:
    if kind == "vit":
        return VitTest(pictures=len(PICTURES), repeats=setting.repeats, scratch=scratch)
    tokenizer = StoryTokenizer(Bundle.open(setting.bundles["float32"]).file(TOKENIZER))
    return DecoderTest(tokenizer, depth=setting.depth, steps=setting.steps, rounds=setting.rounds)


def command(engine: Engine, setting: Setting, workshop: Workshop, scratch: Path) -> list[str]:
    """How the engine is started; makes what it needs. Raises Gap."""
    words = setting.words(scratch)
    given = [str(workshop.path(a)) if isinstance(a, Made) else a.format(**words) for a in engine.arguments]
    return [workshop.python(engine.venv), str(SERVE), engine.worker, *given]


def _meet(
    test: Test,
    reference: Engine,
    engines: Sequence[Engine],
    plan: Plan,
    setting: Setting,
    say: Callable[[str], None],
) -> None:
    """Engines of one kind, all running while they are measured."""
    with ExitStack() as opened:

        def start(engine: Engine) -> Worker:
            environment = peer_environment() if engine.venv.name else dict(os.environ)
            worker = Worker(plan.commands[engine.key], environment, setting.patience)
            opened.callback(worker.close)
            return worker

        try:
            first = start(reference)
            truth = test.answers(first)
            first.close()
        except Gap as gap:
            raise _own_failure(reference, gap) from gap
        workers: dict[str, Asked] = {}
        for engine in engines:
            say(f"starting {engine.title}")
            result = plan.results[engine.key]
            try:
                worker = start(engine)
                result.version = worker.version
                test.check(result, test.answers(worker), truth)
                workers[engine.key] = worker
            except Gap as gap:
                result.fail(gap)
        take_turns(workers, plan.results, test.turn, setting.rounds, say)


def _own_failure(engine: Engine, reason: object) -> SeedStoryError:
    return SeedStoryError(f"{engine.title}, {engine.kind}, can't be measured", got=reason,
                          hint="Are the bundles whole? Try `seed-story doctor`.")  # fmt: skip
