"""Graphs in INT8: products with weights become products of integers, tables of embeddings small.

A product of integers is ONNX Runtime's ``MatMulIntegerToFloat``, which OpenVINO reads too: it takes the bias with it,
and gives float32, so that no operator between two products has to know of integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graph import MICROSOFT, OPSETS

LEAST_ROWS = 256
"""Rows of a table that is made small."""
TINY = np.float32(1e-12)
"""Least scale, of what is all zeros."""
ZERO = 128
"""Zero of a token's values, which are symmetric."""


def products(model: onnx.ModelProto, head: bool) -> list[onnx.NodeProto]:
    """Returns the nodes that multiply by a matrix of weights, without the head's, the last: rounding its few weights
    would save nothing."""
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    nodes = [node for node in model.graph.node if _multiplies(node) and node.input[1] in weights]
    return nodes[: len(nodes) - head]


def _multiplies(node: onnx.NodeProto) -> bool:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    usual = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return node.op_type == "MatMul" or (
        node.op_type == "Gemm" and all(given.get(name, value) == value for name, value in usual.items())
    )


def factors(model: onnx.ModelProto) -> dict[str, str]:
    """Returns what is multiplied with each other in attention: name -> ``query``, ``key`` or ``value``, before heads
    are split, or ``probabilities``. The last layer for [CLS] alone attends to its
    input, which stays in float32."""
    makers = {name: node for node in model.graph.node for name in node.output}
    roles: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or not all(name in makers for name in node.input):
            continue
        names = [_made(name, makers) for name in node.input]
        kinds = [makers[name].op_type if name in makers else "" for name in names]
        if not {"", "LayerNormalization"}.intersection(kinds):
            roles |= zip(names, ("probabilities", "value") if kinds[0] == "Softmax" else ("query", "key"))
    return roles


def _made(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """Returns the name of a tensor before it was reshaped and transposed."""
    while name in makers and makers[name].op_type in ("Reshape", "Transpose"):
        name = makers[name].input[0]
    return name


class IntegerGraph:
    """A model whose products are turned into products of integers.

    Weights are signed and symmetric; inputs are unsigned.

    Args:
        model: changed in place.
        per_channel: a scale for each column of a weight, instead of one for all.
        most: the largest number that a weight, a key or a value becomes.
    """

    def __init__(self, model: onnx.ModelProto, per_channel: bool, most: int) -> None:
        self.model, self._per_channel, self._most = model, per_channel, most
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []

    def write(self, nodes: Collection[onnx.NodeProto], ranges: Mapping[str, tuple[float, float]] | None) -> None:
        """Replaces nodes that `products` returned, and where scales are fixed, has attention multiply integers too.

        Args:
            ranges: of the inputs of `nodes` and of `factors`, by name, where scales are fixed; None for a scale of each
                token, of its own values, and attention in float32.
        """
        if ranges is not None:
            self._round_factors(ranges)
        graph = self.model.graph
        replaced = {node.output[0] for node in nodes}
        biases = self._biases(replaced)
        inputs: dict[str, list[str]] = {}
        for node in list(graph.node):
            if node.output[0] in biases.values():
                continue
            if node.output[0] not in replaced:
                self._nodes.append(node)
                continue
            x, output, bias = node.input[0], node.output[0], node.input[2] if len(node.input) > 2 else ""
            if added := biases.get(output):
                adding = self._makers[added]
                bias, output = next(name for name in adding.input if name != output), added
            if x not in inputs:
                inputs[x] = self._fixed(x, *ranges[x]) if ranges is not None else self._of_tokens(x)
            weight, scales = self._weight(node)
            integers, scale, zero, *of_tokens = inputs[x]
            if not of_tokens:
                self._multiply([integers, weight, scale, scales, zero, "", bias], output)
                continue
            product = f"{output}_product"
            self._multiply([integers, weight, scale, scales, zero], product)
            scaled = f"{output}_scaled" if bias else output
            self._add("Mul", [product, *of_tokens], scaled)
            if bias:  # Sum, since ONNX Runtime fuses Add with an activation after it into an operator half as fast
                self._add("Sum", [scaled, bias], output)
        del graph.node[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        if not any(opset.domain == MICROSOFT for opset in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, OPSETS[MICROSOFT]))

    def _round_factors(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Puts attention's factors through integers where they are made: runtimes carry the integers on to the
        products. Keys and values are symmetric, which their products need; probabilities are from 0 to 1."""
        graph, roles = self.model.graph, factors(self.model)
        nodes: list[onnx.NodeProto] = []
        rounded: dict[str, str] = {}
        for node in list(graph.node):
            if node.op_type in ("Reshape", "Transpose", "MatMul"):
                node.input[:] = [rounded.get(name, name) for name in node.input]
            nodes.append(node)
            for name in set(node.output) & roles.keys():
                low, high = ranges[name]
                largest = np.float32(max(-low, high, 127 * float(TINY)))
                scale, zero = largest / np.float32(self._most), np.array(0, np.int8)
                if roles[name] == "query":
                    scale, zero = largest / np.float32(127), np.array(ZERO, np.uint8)
                elif roles[name] == "probabilities":
                    scale, zero = np.float32(1 / 255), np.array(0, np.uint8)
                step = [self._constant(f"{name}_step", scale), self._constant(f"{name}_middle", zero)]
                integers, rounded[name] = f"{name}_integers", f"{name}_rounded"
                for kind, before, after in (("Quantize", name, integers), ("Dequantize", integers, rounded[name])):
                    nodes.append(helper.make_node(f"{kind}Linear", [before, *step], [after], name=after))
        del graph.node[:]
        graph.node.extend(nodes)

    def _biases(self, products: Collection[str]) -> dict[str, str]:
        """Returns products' outputs -> the sums of them and a bias, where nothing else takes the product."""
        graph = self.model.graph
        self._makers = {name: node for node in graph.node for name in node.output}
        uses = Counter(name for node in graph.node for name in node.input)
        uses.update(put.name for put in graph.output)
        sums = {}
        for node in graph.node:
            for product, bias in (node.input, reversed(node.input)) if node.op_type == "Add" else ():
                vector = bias in self._constants and len(self._constants[bias].dims) == 1
                if vector and product in products and uses[product] == 1 and len(self._makers[product].input) == 2:
                    sums[product] = node.output[0]
        return sums

    def _weight(self, node: onnx.NodeProto) -> tuple[str, str]:
        """Returns the names of a product's weight in INT8, and of its scales."""
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        weight = numpy_helper.to_array(self._constants[node.input[1]])
        weight = np.ascontiguousarray(weight.T) if transposed else weight
        scales = np.abs(weight).max(axis=0 if self._per_channel else None) / np.float32(self._most)
        scales = np.maximum(scales, TINY)
        name = f"{node.input[1]}{'_transposed' if transposed else ''}"
        integers = np.round(weight / scales).astype(np.int8)
        return self._constant(f"{name}_quantized", integers), self._constant(f"{name}_scales", scales)

    def _fixed(self, x: str, low: float, high: float) -> list[str]:
        """Writes the input `x` in integers, by a range that is known; returns names of integers, scale and zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.maximum(np.float32((high - low) / 255), TINY)
        zero = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        names = [self._constant(f"{x}_scale", scale), self._constant(f"{x}_zero", zero)]
        return [self._add("QuantizeLinear", [x, *names], f"{x}_quantized"), *names]

    def _of_tokens(self, x: str) -> list[str]:
        """Writes the input `x` [..., D] in integers, each token's values by their own range; returns names of integers,
        scale and zero, and of the scales [..., 1] that products are to be multiplied by."""
        one, zero = self._constant("int8_one", np.float32(1)), self._constant("int8_zero", np.uint8(ZERO))
        last, first, second = (self._constant(f"int8_axis_{i}", np.array([i], np.int64)) for i in (-1, 0, 1))
        ends = []
        for kind, step in (("Max", 1 / 127), ("Min", -1 / 127)):
            end = self._add(f"Reduce{kind}", [x, last], f"{x}_{kind}", keepdims=1)
            ends.append(
                self._add("Mul", [end, self._constant(f"int8_step_{kind}", np.float32(step))], f"{x}_{kind}_scale")
            )
        scales = self._add("Max", [*ends, self._constant("int8_tiny", TINY)], f"{x}_largest")
        # If there are no rows, ONNX Runtime's ReduceMax keeps the last axis; Slice makes it 1.
        scales = self._add("Slice", [scales, first, second, last], f"{x}_scales")
        scaled = self._add("Div", [x, scales], f"{x}_scaled")
        return [self._add("QuantizeLinear", [scaled, one, zero], f"{x}_quantized"), one, zero, scales]

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _multiply(self, inputs: list[str], output: str) -> None:
        while not inputs[-1]:
            inputs.pop()
        self._add("MatMulIntegerToFloat", inputs, output, domain=MICROSOFT)

    def _add(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output


def with_signed_factors(content: bytes) -> bytes:
    """Returns an ONNX file whose values that only pass through unsigned integers around `ZERO` pass through signed ones
    around 0: they stay the same. OpenVINO would subtract the zero in float32 before it multiplies attention's queries,
    which takes a twentieth of an INT8 model's time; ONNX Runtime is as much faster with unsigned ones."""
    if b"QuantizeLinear" not in content:
        return content
    model = onnx.load_from_string(content)
    graph = model.graph
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            users.setdefault(name, []).append((node, place))
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {put.name for put in graph.output}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.UINT8 or numpy_helper.to_array(tensor).tolist() != ZERO:
            continue
        uses = users.get(tensor.name, [])
        rounding = [
            node for node, place in uses if place == 2 and node.op_type in ("QuantizeLinear", "DequantizeLinear")
        ]
        integers = {node.output[0] for node in rounding if node.op_type == "QuantizeLinear"}
        integers |= {node.input[0] for node in rounding if node.op_type == "DequantizeLinear"}
        steps = [node for name in integers for node in (makers.get(name), *(user for user, _ in users.get(name, [])))]
        if len(rounding) == len(uses) and all(step in rounding for step in steps) and not integers & outputs:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), tensor.name))
    return model.SerializeToString()


def shrink_embeddings(model: onnx.ModelProto) -> None:
    """Turns large tables into INT8: rows are looked up, then scaled, each with a scale of its own."""
    tables = {table.name: table for table in model.graph.initializer}
    nodes = list(model.graph.node)
    uses = Counter(name for node in nodes for name in node.input)
    for node in list(nodes):
        table = tables.get(node.input[0]) if node.op_type == "Gather" and uses[node.input[0]] == 1 else None
        if table is None or table.data_type != TensorProto.FLOAT or len(table.dims) != 2:
            continue
        if table.dims[0] < LEAST_ROWS:
            continue
        rows = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(127), TINY)
        name = node.output[0]
        small = numpy_helper.from_array(np.round(rows / scales).astype(np.int8), f"{table.name}_quantized")
        model.graph.initializer.extend([small, numpy_helper.from_array(scales, f"{table.name}_scales")])
        model.graph.initializer.remove(table)
        place = nodes.index(node)
        nodes[place : place + 1] = [
            helper.make_node("Gather", [small.name, node.input[1]], [f"{name}_quantized"]),
            helper.make_node("Cast", [f"{name}_quantized"], [f"{name}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{table.name}_scales", node.input[1]], [f"{name}_scales"]),
            helper.make_node("Mul", [f"{name}_cast", f"{name}_scales"], [name]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
