"""Who is measured, what each is installed from and loads, and beside which of this project's bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.peers.files import Made
from benchmarks.peers.venvs import OWN, Venv
from benchmarks.peers.weights import PICTURES
from model.presets import SEED_STORY_135M
from seed_story.device import ROOT, simd_features

_HERE = Path(__file__).parents[1]
_MAKERS = _HERE / "makers"


def without_amx(root: Path = ROOT) -> dict[str, str]:
    """For a compiler that would use AMX: with it, llama.cpp ends in a segmentation fault (ggml-org/llama.cpp#20824)."""
    if "amx_int8" not in (simd_features(root) or ()):
        return {}
    return {"CMAKE_ARGS": "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"}


LLAMA_CPP = Venv("llama-cpp", ("llama-cpp-python==0.3.36",), without_amx)
TORCH = Venv("torch", ("torch==2.13.0", "transformers==5.23.0"))
LITERT_LM = Venv("litert-lm", ("litert-lm-api==0.18.1",))
GENAI = Venv("onnxruntime-genai", ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"))
ONNXRUNTIME = Venv("onnxruntime", ("onnxruntime==1.32.0", "onnx==1.23.2", "sympy==1.14.0"))
OPENVINO = Venv("openvino", ("openvino==2026.4.1",))

# Their tools, which nothing is measured in. litert-torch needs TensorFlow without asking for it.
LITERT_TORCH = Venv("litert-torch", ("litert-torch==0.10.0", "tensorflow==2.21.0", *TORCH.pins))
ONNX_TOOLS = Venv("onnx-tools", (*GENAI.pins, "onnx==1.23.2", "onnx-ir==1.1.0", *TORCH.pins))
NNCF = Venv("nncf", (*OPENVINO.pins, "nncf==3.4.0", "onnx==1.23.2"))

_WRITE = ("-m", "benchmarks.peers.weights")
_WRITER = _HERE / "peers" / "weights.py"
_WEIGHTS = tuple(file.sha256 for file in SEED_STORY_135M.files)

GGUF = Made("model.gguf", OWN, (*_WRITE, "gguf", "{target}"), facts=_WEIGHTS)
DECODER = Made("decoder", OWN, (*_WRITE, "decoder", "{target}"), facts=(*_WEIGHTS, _WRITER))
VISION = Made("vision", OWN, (*_WRITE, "vision", "{target}"), facts=(*_WEIGHTS, _WRITER))
PIXELS = Made("pictures.npz", OWN, (*_WRITE, "pictures", "{target}"), facts=(*PICTURES, _WRITER))


def gguf(kind: str) -> Made:
    """The GGUF file requantized to one of llama.cpp's types, from its own values."""
    return Made(f"{kind}.gguf", LLAMA_CPP, (_MAKERS / "requantize_gguf.py", "{0}", kind, "{target}"), (GGUF,))


def _genai(bits: str) -> Made:
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", "{0}", "-o", "{target}", "-p", bits, "-e", "cpu")
    return Made(f"genai-{bits}", ONNX_TOOLS, builder, (DECODER,))


CACHE_LENGTH = 640
"""Tokens that LiteRT-LM's file has room for: it is a size of its graphs."""

LITERTLM = Made("model.litertlm", LITERT_TORCH, (
    "-m", "litert_torch.cli", "export_hf", "--model={0}", "--output_dir={folder}", "--prefill_lengths=[512]",
    f"--cache_length={CACHE_LENGTH}", "--quantization_recipe=dynamic_wi8_afp32"), (DECODER,))  # fmt: skip
VIT = Made("vit.onnx", ONNX_TOOLS, (_MAKERS / "dinov2_to_onnx.py", "{0}", "{target}"), (VISION,))
_QUANTIZE = _MAKERS / "quantize_onnx.py"
VIT_DYNAMIC = Made("vit-dynamic.onnx", ONNXRUNTIME, (_QUANTIZE, "{0}", "{1}", "dynamic", "{target}"), (VIT, PIXELS))
VIT_STATIC = Made("vit-static.onnx", ONNXRUNTIME, (_QUANTIZE, "{0}", "{1}", "static", "{target}"), (VIT, PIXELS))
VIT_OPENVINO = Made("model.xml", NNCF, (_MAKERS / "openvino_int8.py", "{0}", "{1}", "{target}"), (VIT, PIXELS))


@dataclass(frozen=True)
class Engine:
    """Something that is measured.

    Args:
        key: its name in `--only` and in the JSON.
        title: its name in the table.
        kind: what it runs.
        venv, worker, arguments: how `benchmarks/workers/serve.py` is run. Of the arguments, words may name what
            `session.Setting` has, in braces.
        ours: keys of this project's engines that it is compared with, the like one first; none for ours themselves.
    """

    key: str
    title: str
    kind: Literal["decoder", "vit"]
    venv: Venv
    worker: str
    arguments: tuple[str | Made, ...]
    ours: tuple[str, ...] = ()


def _own(recipe: str, kind: Literal["decoder", "vit"]) -> Engine:
    if kind == "decoder":
        return Engine(recipe, f"this project, {recipe}", kind, OWN, "seed_story_worker", (f"{{{recipe}}}", "{threads}"))
    given = (f"{{{recipe}}}", PIXELS, "{threads}")
    return Engine(f"vit_{recipe}", f"this project, {recipe}", kind, OWN, "seed_story_vit_worker", given)


def _llama(key: str, kind: str, file: Made, ours: str) -> Engine:
    given = (file, "{threads}", "{slots}")
    return Engine(key, f"llama.cpp {kind}", "decoder", LLAMA_CPP, "llama_cpp_worker", given, (ours,))


def _vit(key: str, title: str, venv: Venv, worker: str, file: Made, *ours: str, more: tuple[str, ...] = ()) -> Engine:
    return Engine(key, title, "vit", venv, worker, (file, PIXELS, "{threads}", *more), ours)


OURS = (_own("int8", "decoder"), _own("int4", "decoder"), _own("float32", "vit"), _own("int8", "vit"))
REFERENCES = {"decoder": _own("float32", "decoder"), "vit": _own("float32", "vit")}
"""By kind: which model the others must be."""

_GENAI, _TORCH, _ORT, _OPENVINO = "genai_worker", "torch_worker", "onnxruntime_vit_worker", "openvino_vit_worker"
PEERS = (
    _llama("llama_cpp_int8", "Q8_0", gguf("Q8_0"), "int8"),
    _llama("llama_cpp_int4", "Q4_1 (the file itself)", GGUF, "int4"),
    _llama("llama_cpp_q4_k_m", "Q4_K_M", gguf("Q4_K_M"), "int4"),
    Engine("litert_lm", "LiteRT-LM int8", "decoder", LITERT_LM, "litert_lm_worker",
           (LITERTLM, "{threads}", "{slots}", "{scratch}"), ("int8",)),
    Engine("onnxruntime_genai_int8", "ONNX Runtime GenAI int8", "decoder", GENAI, _GENAI,
           (_genai("int8"), "{threads}", "{slots}"), ("int8",)),
    Engine("onnxruntime_genai_int4", "ONNX Runtime GenAI int4", "decoder", GENAI, _GENAI,
           (_genai("int4"), "{threads}", "{slots}"), ("int4",)),
    Engine("torch", "PyTorch float32", "decoder", TORCH, _TORCH, (DECODER, "{threads}", "float32"), ("int8",)),
    Engine("torch_bfloat16", "PyTorch bfloat16", "decoder", TORCH, _TORCH, (DECODER, "{threads}", "bfloat16"),
           ("int8",)),
    _vit("onnxruntime_float32", "ONNX Runtime float32", ONNXRUNTIME, _ORT, VIT, "vit_float32", "vit_int8"),
    _vit("onnxruntime_int8", "ONNX Runtime int8, dynamic", ONNXRUNTIME, _ORT, VIT_DYNAMIC, "vit_int8"),
    _vit("onnxruntime_int8_static", "ONNX Runtime int8, static", ONNXRUNTIME, _ORT, VIT_STATIC, "vit_int8"),
    _vit("openvino", "OpenVINO float32", OPENVINO, _OPENVINO, VIT, "vit_float32", "vit_int8", more=("f32",)),
    _vit("openvino_default", "OpenVINO, its default", OPENVINO, _OPENVINO, VIT, "vit_float32", "vit_int8",
         more=("default",)),
    _vit("openvino_int8", "OpenVINO int8", OPENVINO, _OPENVINO, VIT_OPENVINO, "vit_int8", more=("default",)),
)  # fmt: skip
