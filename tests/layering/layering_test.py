#!/usr/bin/env python3
"""The tree keeps its include DAG, and the checker would notice if it did not."""
import pathlib
import tempfile
import unittest

from check_includes import broken_includes

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Layering(unittest.TestCase):
    def test_tree_keeps_the_dag(self):
        self.assertEqual(list(broken_includes(ROOT)), [])

    def check(self, path, include):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            (root / path).parent.mkdir(parents=True)
            (root / "kernels").mkdir(exist_ok=True)
            (root / path).write_text(f"// a file\n#include {include}\n")
            return list(broken_includes(root))

    def test_upward_include_is_caught(self):
        self.assertEqual(len(self.check("server/scheduler/x.h", '"server/engine/engine.h"')), 1)
        self.assertEqual(len(self.check("kernels/cpu/x.cc", '"server/base/status.h"')), 1)
        self.assertEqual(len(self.check("server/frontend/x.cc", '"server/scheduler/scheduler.h"')), 1)

    def test_library_in_the_wrong_layer_is_caught(self):
        self.assertEqual(len(self.check("server/engine/x.cc", "<grpcpp/grpcpp.h>")), 1)
        self.assertEqual(len(self.check("server/model/x.cc", "<cuda_runtime.h>")), 1)
        self.assertEqual(len(self.check("server/engine/x.cc", '"altiplano/inference/v1/inference.pb.h"')), 1)

    def test_what_is_allowed_passes(self):
        self.assertEqual(self.check("server/frontend/x.cc", "<grpcpp/grpcpp.h>"), [])
        self.assertEqual(self.check("kernels/cuda/x.cu", "<cuda_runtime.h>"), [])
        self.assertEqual(self.check("server/scheduler/x.h", "<vector>"), [])


if __name__ == "__main__":
    unittest.main()
