"""llama.cpp's quantiser in a process of its own: python -m ssmtune.export._quantise REQUEST.json

The package xllamacpp has no function for it and its library no `llama_model_quantize`; ggml's own `ggml_quantize_chunk`,
which that function calls row by row, is exported. ggml ends its process on an internal error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    dequantize,
)

from ssmtune.errors import ConfigError, SsmtuneError
from ssmtune.export.tensor_types import FALLBACKS, Type, q4_k_m_types

CHUNK = 1 << 20
"""Elements that one call quantises, about."""
NUM_ROWS, ERROR_LIMIT = 256, 0.5
"""Rows of each tensor that are read back, and how far they may be from the weights, relative to these (root mean square).

Measured for Q4_K: 0.07; a block of 32 whose numbers are as unequal as they can be stays below 0.4. Other rows: 1.4.
"""


class Quantiser:
    """ggml's quantiser inside xllamacpp's library. Raises `ConfigError` where it is not what this module knows."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp.xllamacpp")
        if spec is None or spec.origin is None:
            raise ConfigError("llama.cpp's quantiser is in the package xllamacpp, which has no library here")
        try:
            library = ctypes.CDLL(spec.origin)
            self._quantise, self._is_valid = library.ggml_quantize_chunk, library.ggml_validate_row_data
            name, block, size = library.ggml_type_name, library.ggml_blck_size, library.ggml_type_size
        except (OSError, AttributeError) as error:
            raise ConfigError(f"llama.cpp's quantiser cannot be called in {Path(spec.origin).name} ({error})") from None
        name.restype, block.restype, size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
        for type_ in (Type.F16, Type.Q8_0, *FALLBACKS, *FALLBACKS.values()):
            known = (type_.name.lower(), *GGML_QUANT_SIZES[type_])
            found = (name(type_.value).decode().lower(), block(type_.value), size(type_.value))
            if found != known:
                raise ConfigError(f"this xllamacpp has {found} as type {type_.value}, the package gguf {known}")
        self._quantise.restype, self._is_valid.restype = ctypes.c_size_t, ctypes.c_bool

    def __call__(
        self, rows_NI: np.ndarray[Any, np.dtype[np.float32]], type_: Type
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the rows [N, I] fp32 as bytes [N, B] of `type_`, made in several threads."""
        num, width = rows_NI.shape
        block, size = GGML_QUANT_SIZES[type_]
        out = np.empty((num, width // block * size), np.uint8)
        step = max(1, CHUNK // width)

        def quantise(first: int) -> bool:
            part, target = np.ascontiguousarray(rows_NI[first : first + step], np.float32), out[first : first + step]
            pointers = (part.ctypes.data_as(ctypes.c_void_p), target.ctypes.data_as(ctypes.c_void_p))
            shape = (ctypes.c_int64(0), ctypes.c_int64(len(part)), ctypes.c_int64(width))
            written = self._quantise(ctypes.c_int(type_.value), *pointers, *shape, None)
            valid = self._is_valid(ctypes.c_int(type_.value), pointers[1], ctypes.c_size_t(target.nbytes))
            return bool(written == target.nbytes and valid)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if not all(pool.map(quantise, range(0, num, step))):
                raise ConfigError(f"ggml's own check refuses what it made of a tensor as {type_.name}")
        return out


def quantise(source: Path, out: Path) -> dict[str, Any]:
    """Write the GGUF file `source` (F32) as Q4_K_M to `out`; return how many tensors have which type, and which fell back."""
    reader = GGUFReader(source)
    arch = reader.fields[Keys.General.ARCHITECTURE].contents()
    numbers = [reader.get_field(key.format(arch=arch)) for key in (Keys.LLM.BLOCK_COUNT, Keys.LLM.EXPERT_COUNT)]
    num_layers, num_experts = (0 if field is None else int(field.contents()) for field in numbers)
    shapes = {t.name: [int(n) for n in t.shape] for t in reader.tensors}
    types = q4_k_m_types(shapes, num_layers=num_layers, num_experts=num_experts)
    quantiser, writer = Quantiser(), GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name not in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE) and not field.name.startswith("GGUF."):
            item = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_M)
    for tensor in reader.tensors:
        kind, shape, dtype = tensor.tensor_type, tensor.data.shape, tensor.data.dtype
        if tensor.name in types:
            kind, dtype = types[tensor.name][1], np.dtype(np.uint8)
            block, size = GGML_QUANT_SIZES[kind]
            shape = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    errors = {}
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in types:
            rows, kind = data.reshape(-1, data.shape[-1]), types[tensor.name][1]
            data = quantiser(rows, kind)
            errors[tensor.name] = _error_of(rows, data, kind)
        writer.write_tensor_data(data)
    writer.close()
    stored = Counter(types[t.name][1].name if t.name in types else t.tensor_type.name for t in reader.tensors)
    fell_back = {name: f"{want.name} -> {got.name}" for name, (want, got) in types.items() if want != got}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= ERROR_LIMIT:
        raise ConfigError(f"what it made of {worst} is {errors[worst]:.2g} away from the weights (limit {ERROR_LIMIT})")
    return {
        "tensor_types": dict(sorted(stored.items())),
        "fell_back": fell_back,
        "largest_error": {"tensor": worst, "relative": errors[worst]},
    }


def _error_of(rows_NI: Any, made: Any, type_: Type) -> float:
    """How far some rows are from what was made of them, read by the package gguf's own code for the type."""
    every = slice(None, None, max(1, len(rows_NI) // NUM_ROWS))
    source, found = rows_NI[every], dequantize(made[every], type_)
    scale = float(np.linalg.norm(source))
    return float(np.linalg.norm(found - source)) / scale if scale else float(np.abs(found).max())


def main(request_path: str) -> int:
    """Quantise one file. Returns the exit status."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    try:
        facts = quantise(Path(request["source"]), Path(request["out"]))
    except SsmtuneError as error:
        print(error, file=sys.stderr)
        return 1
    Path(request["found"]).write_text(json.dumps(facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
