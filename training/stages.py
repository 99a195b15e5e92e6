"""The stages of a training, one after the other, and the checkpoint that they end in."""

from __future__ import annotations

import functools
import json
import platform
import shutil
from collections.abc import Callable, Iterable
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
from seed_story.tokenizer import StoryTokenizer
from training.alignment import Alignment, WordLoss
from training.checkpoint import planned_steps
from training.data import StoryEncoder, StoryRecord, check_pictures, chunks, read_stories, training_file
from training.features import FeatureStore
from training.loop import planned, train
from training.names import SLOTS, Labels, NameTable, name_table, read_labels
from training.pictures import Labelled
from training.recipe import Recipe, data_fingerprint
from training.recognition import Recognition
from training.storytelling import Networks, Storytelling, foreseen_pool
from training.task import Outcome, Schedule, Task

TAUGHT_FILE = "taught.jsonl"
"""Of a data set: stories that a teacher wrote about the same pictures, if there are any."""
CARDS_FILE, NAMES_FILE = "cards.jsonl", "names.json"
"""More pictures to recognize, and other words for the names; a data set may have them."""
HEAD_FILE = "picture_head.safetensors"
_PLACEHOLDER = 1000  # steps of a schedule whose length is measured first


@dataclass(frozen=True)
class _Training:
    """What all stages share.

    Args:
        labels: of the stories' pictures.
        cards: of pictures that are only recognized.
        frozen: what the ViT's frozen blocks see, where the trained ones go on.
        untrained: what the trained blocks see before their training.
        seen: what they see after recognition; the same as `untrained` without one. All three are one, where no block
            is trained.
    """

    recipe: Recipe
    source: StorySource
    networks: Networks
    stories: list[StoryRecord]
    labels: Labels
    cards: Labels
    tokenizer: StoryTokenizer
    table: NameTable
    words: np.ndarray[Any, np.dtype[np.float32]]
    frozen: FeatureStore
    untrained: FeatureStore
    seen: FeatureStore
    data: str

    @property
    def trains_vision(self) -> bool:
        """Whether any block of the ViT is trained."""
        return self.frozen is not self.untrained

    @property
    def recognizes(self) -> bool:
        """Whether there is a stage that trains the ViT's blocks to recognize things; no later one changes them then."""
        return self.seen is not self.untrained

    @property
    def name(self) -> str:
        """What must be the same when a training goes on."""
        return f"{self.source.name}, data {self.data}, {self.recipe.vision_blocks} blocks"


@dataclass(frozen=True)
class _Stage:
    """One of them.

    Args:
        make: the task.
        begin, end: what the task does before its first step, and after its last.
        minutes, learning_rate: of its schedule.
    """

    name: str
    make: Callable[[], Task]
    begin: Callable[[Any], None]
    minutes: float
    learning_rate: float
    end: Callable[[Any], None] = lambda task: None


def train_model(preset: str, data: Path, out: Path, recipe: Recipe) -> bool:
    """Trains, or goes on; whether it came to its end, with the result in `out / "checkpoint"`.

    Raises:
        UsageError: there is no data set, or the recipe doesn't fit the model.
        TrainingError: see `training.loop.train`.
    """
    training = _prepare(preset, data, out, recipe)
    outcomes: dict[str, Outcome] = {}
    for stage in _stages(training):
        outcomes[stage.name] = _run(stage, recipe, out / stage.name)
        if not outcomes[stage.name].finished:
            return False
    _write_checkpoint(training, outcomes, out / "checkpoint")
    return True


def _prepare(preset: str, data: Path, out: Path, recipe: Recipe) -> _Training:
    file = training_file(data)
    told = [file, *filter(Path.is_file, [data / TAUGHT_FILE])]
    stories = [chunk for each in told for story in read_stories(each) for chunk in chunks(story)]
    files = [*told, *filter(Path.is_file, [data / CARDS_FILE, data / NAMES_FILE])]
    cards = read_labels(data / CARDS_FILE) if data / CARDS_FILE in files else {}
    also = json.loads((data / NAMES_FILE).read_text(encoding="utf-8")) if data / NAMES_FILE in files else {}
    check_pictures(stories)
    source = load_source(preset, checkpoint="none")
    model, tokenizer = source.model, StoryTokenizer(source.tokenizer)
    vision = model.vision
    trained = min(recipe.vision_blocks, vision.config.feature_layer)
    vision.set_trainable_blocks(trained)
    words = numpy_of(model.llama.model.embed_tokens.weight)
    labels = read_labels(file)
    names = sorted({name for things, place in (labels | cards).values() for name in (*things, place)})
    table = name_table(names, tokenizer, model.config.qformer.num_queries, also)
    memory = {"memory_names": table.memory_size, "memory_slots": SLOTS} if labels else {}
    qformer = initial_qformer(replace(model.config.qformer, **memory), words, recipe.seed)
    foreseen = 1 + (vision.config.grid // foreseen_pool(vision.config.grid)) ** 2
    head = PictureHead(model.config.llama.hidden_size, vision.config.hidden_size, foreseen, recipe.seed)
    _prepare_decoder(model.llama, recipe)
    layer = vision.config.feature_layer
    frozen = FeatureStore(out / "features", data, vision, layer - trained)
    untrained = FeatureStore(out / "features", data, vision, layer, frozen) if trained else frozen
    recognizes = trained and labels and recipe.recognizing
    seen = FeatureStore(out / "recognition" / "features", data, vision, layer, frozen) if recognizes else untrained
    networks = Networks(vision, qformer, model.llama, head)
    return _Training(recipe, source, networks, stories, labels, cards, tokenizer, table, words, frozen, untrained, seen,
                     data_fingerprint(files))  # fmt: skip


def _prepare_decoder(llama: Any, recipe: Recipe) -> None:
    if recipe.decoder == "lora":
        add_lora(llama, recipe.rank, recipe.seed)
    else:
        llama.trainable = recipe.decoder == "full"


def _stages(training: _Training) -> list[_Stage]:
    """Recognition and alignment need names, recognition also blocks of the ViT to train."""
    recipe = training.recipe
    recognizing = recipe.recognizing if training.recognizes else 0.0
    aligning = recipe.aligning if training.labels else 0.0
    stages = []
    recognition = functools.cache(lambda: _recognition(training))  # alignment begins with what it found out
    if recognizing:
        stages.append(_Stage("recognition", recognition,
                             lambda task: task.prepare(_filled(training, training.untrained, training.cards)),
                             recognizing * recipe.minutes, recipe.recognize_rate,
                             end=Recognition.finish))  # fmt: skip
    if aligning:
        stages.append(_Stage("alignment", lambda: _alignment(training),
                             lambda task: task.prepare(recognition().classifiers() if recognizing else ()),
                             aligning * recipe.minutes, recipe.align_rate))  # fmt: skip
    minutes = (1 - recognizing - aligning) * recipe.minutes
    stages.append(_Stage("story", lambda: _storytelling(training), lambda task: None, minutes, recipe.story_rate))
    return stages


def _filled(training: _Training, store: FeatureStore, more: Iterable[Path] = ()) -> FeatureStore:
    store.fill([*(page.picture for story in training.stories for page in story.pages), *more])
    return store


def _labelled(labels: Labels) -> list[Labelled]:
    return [Labelled(picture, *label) for picture, label in labels.items()]


def _recognition(training: _Training) -> Recognition:
    pictures, net = _labelled(training.labels | training.cards), training.networks
    return Recognition(pictures, _filled(training, training.frozen, training.cards), net.vision, net.qformer,
                       name=f"recognition, {training.name}", seed=training.recipe.seed,
                       batch_size=min(training.recipe.recognize_batch, len(pictures)))  # fmt: skip


def _alignment(training: _Training) -> Alignment:
    pictures = _labelled(training.labels)
    return Alignment(pictures, _filled(training, training.seen), training.networks.qformer, training.table,
                     training.words, name=f"alignment, {training.name}", seed=training.recipe.seed,
                     batch_size=min(training.recipe.align_batch, len(pictures)))  # fmt: skip


def _storytelling(training: _Training) -> Storytelling:
    recipe, net = training.recipe, training.networks
    encoder = StoryEncoder(training.tokenizer, training.source.prompt, net.qformer.config.num_queries)
    labels = {picture: training.table.label(*label) for picture, label in training.labels.items()}
    words = WordLoss(training.table, training.words) if labels else None
    return Storytelling(
        training.stories, encoder, _filled(training, training.seen if training.recognizes else training.frozen), net,
        words, labels,
        name=f"storytelling, {training.name}", length=min(recipe.length, net.llama.config.max_position),
        rows=recipe.rows, seed=recipe.seed, factors={"qformer": 0.02, "vision": 0.02},
    )  # fmt: skip


def _run(stage: _Stage, recipe: Recipe, out: Path) -> Outcome:
    """Trains a stage; its first run turns minutes into steps, which later ones read back."""
    task = stage.make()
    if planned_steps(out) is None:
        stage.begin(task)
    schedule = Schedule(_PLACEHOLDER, stage.learning_rate, weight_decay=recipe.weight_decay,
                        mixed_precision=recipe.mixed_precision)  # fmt: skip
    outcome = train(task, out, planned(task, out, schedule, stage.minutes))
    if outcome.finished:
        stage.end(task)
    return outcome


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
    if training.trains_vision:
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
