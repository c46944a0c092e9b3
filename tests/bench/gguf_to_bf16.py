#!/usr/bin/env python3
"""Copies a GGUF file with every matrix widened to bf16, so that several engines can read the same weights.

    gguf_to_bf16.py IN.gguf OUT.gguf
"""
import os
import sys

import gguf
import numpy as np
from gguf import quants


def to_bf16(values):  # to nearest, ties to even
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def main(source, target):
    reader = gguf.GGUFReader(source)
    unfinished = target + ".part"
    writer = gguf.GGUFWriter(unfinished, reader.fields["general.architecture"].contents())
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in own:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, to_bf16(values).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.rename(unfinished, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
