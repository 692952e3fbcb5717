"""ONNX graphs written operator by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

MICROSOFT, ML = "com.microsoft", "ai.onnx.ml"
OPSETS = {"": 20, ML: 4, MICROSOFT: 1}
"""Versions of operators: the first that hold all that is used here; ONNX Runtime has them since 1.17."""
IR_VERSION = 9


class Graph:
    """Nodes and constants under construction. Tensors are named; numbers and (nested) lists of them among the inputs
    of `op` become int64 constants.

    Args:
        prefix: of all names.
        parent: the graph around a loop's body, which keeps its constants.
    """

    def __init__(self, prefix: str = "", parent: Graph | None = None) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.types: list[onnx.ValueInfoProto] = []
        self.root: Graph = parent.root if parent else self
        if parent is None:
            self.constants: dict[tuple[Any, ...], onnx.TensorProto] = {}
            self._named = 0

    def name(self, stem: str) -> str:
        """Returns a new name."""
        self.root._named += 1
        return f"{self.prefix}{stem}_{self.root._named}"

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Returns the name of a constant; equal constants are kept once."""
        array = np.asarray(value, dtype)
        known = self.root.constants
        key = (array.dtype.str, array.shape, array.tobytes() if array.dtype != object else tuple(array))
        if key not in known:
            known[key] = numpy_helper.from_array(array, self.name("constant"))
        return known[key].name

    def op(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> str:
        """Adds a node; returns the name of its output."""
        return self.ops(1, kind, *inputs, domain=domain, **attributes)[0]

    def ops(self, outputs: int, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> list[str]:
        """Adds a node with several outputs; returns their names."""
        names = [self.name(kind) for _ in range(outputs)]
        self.into(names, kind, *inputs, domain=domain, **attributes)
        return names

    def into(self, outputs: list[str], kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> None:
        """Adds a node whose outputs have names already."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        node = helper.make_node(kind, names, outputs, name=self.name(kind), domain=domain, **attributes)
        self.nodes.append(node)

    def copy(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Adds a copy of another graph's node, whose names are other than this graph's."""
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        self.nodes.append(copied)
        return copied


def model_of(graph: Graph, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """Returns a model of a finished graph."""
    constants = list(graph.constants.values())
    whole = helper.make_graph(graph.nodes, "graph", inputs, outputs, constants, value_info=graph.types)
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    return helper.make_model(whole, ir_version=IR_VERSION, opset_imports=opsets)
