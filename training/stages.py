"""The stages of a training, one after the other, and the checkpoint that they end in."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np

from model.layers import named_variables, numpy_of
from model.lora import add_lora, lora_tensors
from model.picture_head import PictureHead
from model.qformer import initial_qformer
from model.story_source import DECODER_FILE, LORA_FILE, QFORMER_FILE, VISION_FILE, StorySource, load_source
from model.weights import write_safetensors
from seed_story.errors import UsageError
from seed_story.tokenizer import StoryTokenizer
from training.alignment import Alignment, Labelled, WordLoss
from training.checkpoint import planned_steps
from training.data import StoryEncoder, StoryRecord, check_pictures, chunks, read_stories
from training.features import FeatureStore
from training.loop import steps_for_minutes, train
from training.names import NameTable, name_table, read_labels
from training.recipe import Recipe, data_fingerprint
from training.storytelling import Networks, Storytelling, foreseen_pool
from training.task import Outcome, Schedule, Task

TRAIN_FILE, TAUGHT_FILE = "train.jsonl", "taught.jsonl"
"""Of a data set: the stories, and those that a teacher wrote about the same pictures, if there are any."""
HEAD_FILE = "picture_head.safetensors"
_PLACEHOLDER = 1000  # steps of a schedule whose length is measured first


@dataclass(frozen=True)
class _Training:
    """What all stages share."""

    recipe: Recipe
    source: StorySource
    networks: Networks
    stories: list[StoryRecord]
    labels: dict[Path, tuple[tuple[str, ...], str]]
    tokenizer: StoryTokenizer
    table: NameTable
    words: np.ndarray[Any, np.dtype[np.float32]]
    frozen: FeatureStore
    seen: FeatureStore
    data: str

    @property
    def name(self) -> str:
        """What must be the same when a training goes on."""
        return f"{self.source.name}, data {self.data}"


def train_model(preset: str, data: Path, out: Path, recipe: Recipe) -> bool:
    """Trains, or goes on; whether it came to its end, with the result in `out / "checkpoint"`.

    Raises:
        UsageError: there is no data set, or the recipe doesn't fit the model.
        TrainingError: see `training.loop.train`.
    """
    training = _prepare(preset, data, out, recipe)
    outcomes: dict[str, Outcome] = {}
    for stage, (task, schedule, minutes) in _stages(training).items():
        made = task()
        if isinstance(made, Alignment) and planned_steps(out / stage) is None:
            made.prepare()
        outcomes[stage] = _run(made, schedule, minutes, out / stage)
        if not outcomes[stage].finished:
            return False
    _write_checkpoint(training, outcomes, out / "checkpoint")
    return True


def _prepare(preset: str, data: Path, out: Path, recipe: Recipe) -> _Training:
    file = data / TRAIN_FILE
    if not file.is_file():
        raise UsageError("there is no data set", got=str(file), expected=f"{TRAIN_FILE} in StoryStream's form",
                         hint="`python -m training.storybook build` makes one.")  # fmt: skip
    files = [file, *filter(Path.is_file, [data / TAUGHT_FILE])]
    stories = [chunk for each in files for story in read_stories(each) for chunk in chunks(story)]
    check_pictures(stories)
    source = load_source(preset, checkpoint="none")
    model, tokenizer = source.model, StoryTokenizer(source.tokenizer)
    vision = model.vision
    trained = min(recipe.vision_blocks, vision.config.feature_layer)
    vision.set_trainable_blocks(trained)
    words = numpy_of(model.llama.model.embed_tokens.weight)
    qformer = initial_qformer(model.config.qformer, words, recipe.seed)
    foreseen = 1 + (vision.config.grid // foreseen_pool(vision.config.grid)) ** 2
    head = PictureHead(model.config.llama.hidden_size, vision.config.hidden_size, foreseen, recipe.seed)
    _prepare_decoder(model.llama, recipe)
    labels = read_labels(file)
    names = sorted({name for things, place in labels.values() for name in (*things, place)})
    table = name_table(names, tokenizer, qformer.config.num_queries)
    layer = vision.config.feature_layer
    frozen = FeatureStore(out / "features", data, vision, layer - trained)
    # What the untrained last blocks see: stage 1 begins with it, and with no blocks to train all stages use it.
    seen = FeatureStore(out / "features", data, vision, layer, frozen) if trained else frozen
    (seen if labels else frozen).fill([page.picture for story in stories for page in story.pages])
    networks = Networks(vision, qformer, model.llama, head)
    return _Training(
        recipe, source, networks, stories, labels, tokenizer, table, words, frozen, seen, data_fingerprint(files)
    )


def _prepare_decoder(llama: Any, recipe: Recipe) -> None:
    if recipe.decoder == "lora":
        add_lora(llama, recipe.rank, recipe.seed)
    else:
        llama.trainable = recipe.decoder == "full"


def _stages(training: _Training) -> dict[str, tuple[Callable[[], Task], Schedule, float]]:
    """By name: how to make the task, its schedule but for its length, and its minutes."""
    recipe = training.recipe
    aligning = recipe.aligning if training.labels else 0.0
    schedule = Schedule(
        _PLACEHOLDER, recipe.align_rate, weight_decay=recipe.weight_decay, mixed_precision=recipe.mixed_precision
    )
    stages: dict[str, tuple[Callable[[], Task], Schedule, float]] = {}
    if aligning:
        stages["alignment"] = (lambda: _alignment(training), schedule, aligning * recipe.minutes)
    story = replace(schedule, learning_rate=recipe.story_rate)
    stages["story"] = (lambda: _storytelling(training), story, (1 - aligning) * recipe.minutes)
    return stages


def _alignment(training: _Training) -> Alignment:
    pictures = [Labelled(picture, *label) for picture, label in training.labels.items()]
    return Alignment(pictures, training.seen, training.networks.qformer, training.table, training.words,
                     name=f"alignment, {training.name}", batch_size=min(training.recipe.align_batch, len(pictures)),
                     seed=training.recipe.seed)  # fmt: skip


def _storytelling(training: _Training) -> Storytelling:
    recipe, net = training.recipe, training.networks
    encoder = StoryEncoder(training.tokenizer, training.source.prompt, net.qformer.config.num_queries)
    labels = {picture: training.table.label(*label) for picture, label in training.labels.items()}
    words = WordLoss(training.table, training.words) if labels else None
    return Storytelling(
        training.stories, encoder, training.frozen, net, words, labels, name=f"storytelling, {training.name}",
        length=min(recipe.length, net.llama.config.max_position), rows=recipe.rows, seed=recipe.seed,
        factors={"qformer": 0.2, "vision": 0.02},
    )  # fmt: skip


def _run(task: Task, schedule: Schedule, minutes: float, out: Path) -> Outcome:
    """Trains a stage; its first run turns minutes into steps, which later ones read back."""
    steps = planned_steps(out)
    if steps is None:
        steps = steps_for_minutes(task, schedule, minutes)
    else:
        print(f"{out.name}: going on with the {steps} steps that were planned when it began", file=sys.stderr)
    return train(task, out, replace(schedule, steps=steps))


def _write_checkpoint(training: _Training, outcomes: dict[str, Outcome], out: Path) -> None:
    """The learned weights in float16, half of what they were learned in, and what they were learned from."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    net = training.networks
    files: dict[str, dict[str, Any]] = {QFORMER_FILE: _values(net.qformer), HEAD_FILE: _values(net.head)}
    if training.recipe.decoder == "lora":
        files[LORA_FILE] = lora_tensors(net.llama)
    if training.recipe.decoder == "full":
        files[DECODER_FILE] = _values(net.llama)
    if training.frozen is not training.seen:
        files[VISION_FILE] = _values(net.vision, trainable=True)
    for name, tensors in files.items():
        write_safetensors({key: value.astype(np.float16) for key, value in tensors.items()}, part / name)
    about = {
        "model": training.source.name,
        "data": training.data,
        "recipe": asdict(training.recipe),
        "stages": {stage: asdict(outcome) for stage, outcome in outcomes.items()},
        "machine": f"{platform.machine()}, {keras.config.backend()}",
        "versions": {name: metadata.version(name) for name in ("keras", "numpy", keras.config.backend())},
    }
    (part / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.replace(out)


def _values(network: keras.Layer, *, trainable: bool = False) -> dict[str, Any]:
    named = named_variables(network)
    learned = {id(v) for v in network.trainable_variables}
    return {name: numpy_of(v) for name, v in named.items() if not trainable or id(v) in learned}
