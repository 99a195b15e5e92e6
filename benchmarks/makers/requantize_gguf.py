"""Requantizes a GGUF file, by llama.cpp. Arguments: the file, a name of `TYPES`, and where to write."""

import sys

import llama_cpp

TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}

if __name__ == "__main__":
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = TYPES[sys.argv[2]], True
    if llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[3].encode(), params) != 0:
        raise SystemExit("llama.cpp could not requantize the file")
