"""The contract between MiniLM Duet and a deep-learning framework.

Everything above this floor (text, objectives, training, the applications) is
written once, against these classes, and never imports a framework. A backend is
a room of its own, ``backends/<name>/``, that answers this contract with the
models of its framework's own library:

- `Backend`    the device, its precision, tensors, and the few operations that
               the frameworks spell differently;
- `Model`      a BERT-like model of the framework's library, its layers run one by
               one, on tokens alone, as far as they are needed; or a module of the
               user's (`Backend.adapt`);
- `Trainable`  what training needs of a model, or of several on one encoder
               (`Backend.join`);
- `Optimizer`  AdamW, gradient clipping and loss scaling, as one object.

Tensors pass through as they are. `Tensor` lists what both frameworks' tensors
can do under the same name: code above this floor uses nothing else.

Weights cross this floor as NumPy arrays under the names that Hugging Face's BERT
gives them, without the ``bert.`` prefix (``encoder.layer.0.attention.self.query.weight``,
``pooler.dense.bias``, ``cls.predictions.bias``), linear weights as [out, in]; those of
a module of the user's under its own names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from backends.devices import Device
    from backends.joined import Joined
    from backends.shape import Shape

Weights = Mapping[str, np.ndarray]
Head = Literal["masked_lm", "sequence_classification", "token_classification", "question_answering"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
ONNX_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
ONNX_OUTPUTS: Mapping[Head | None, tuple[str, ...]] = {
    None: ("last_hidden_state", "pooler_output"),
    "sequence_classification": ("logits",),
    "token_classification": ("logits",),
    "question_answering": ("start_logits", "end_logits"),
}
ONNX_OPSET = 20
PROJECTIONS = "projections."
"""What the names of weights begin with that only training needs (`Model.add_projection`)."""
HEADS: tuple[Head, ...] = ("masked_lm", "sequence_classification", "token_classification", "question_answering")


class Tensor(Protocol):
    """What `torch.Tensor` and `paddle.Tensor` share, as far as it is used here."""

    shape: Any
    dtype: Any

    def reshape(self, shape: Sequence[int], /) -> Tensor: ...
    def swapaxes(self, a: int, b: int, /) -> Tensor: ...
    def split(self, sizes: Sequence[int], /) -> Sequence[Tensor]: ...
    def sum(self, axis: int = ..., /) -> Tensor: ...
    def mean(self, axis: int = ..., /) -> Tensor: ...
    def exp(self) -> Tensor: ...
    def tanh(self) -> Tensor: ...
    def sqrt(self) -> Tensor: ...
    def clip(self, min: Any) -> Tensor: ...
    def amax(self, axis: int, /) -> Tensor: ...
    def argmax(self, axis: int, /) -> Tensor: ...
    def exp_(self) -> Tensor: ...
    def tanh_(self) -> Tensor: ...
    def add_(self, other: Any, /) -> Tensor: ...
    def mul_(self, other: Any, /) -> Tensor: ...
    def topk(self, k: int, /) -> Sequence[Tensor]: ...
    def detach(self) -> Tensor: ...
    def item(self) -> Any: ...
    def float(self) -> Tensor: ...
    def __add__(self, other: Any, /) -> Tensor: ...
    def __sub__(self, other: Any, /) -> Tensor: ...
    def __mul__(self, other: Any, /) -> Tensor: ...
    def __truediv__(self, other: Any, /) -> Tensor: ...
    def __pow__(self, other: Any, /) -> Tensor: ...
    def __matmul__(self, other: Any, /) -> Tensor: ...
    def __getitem__(self, index: Any, /) -> Tensor: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...


class Batch(NamedTuple):
    """Token sequences padded to the longest of them. All arrays are int64 [B, L]."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    attention_mask: np.ndarray
    truncated: int = 0
    """How many of the B lines were cut to the maximum length."""
    numbers: np.ndarray | None = None
    """int64 [B], which example of its data set, or line of its corpus, each is; None if of none."""
    of_teacher: Batch | None = None
    """The same texts as a teacher of another vocabulary reads them; None if it reads these tokens."""

    @property
    def sequences(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    def shortest_first(self) -> Batch:
        """The same sequences by length: equally long ones side by side are computed together."""
        return self._in_order(np.argsort(self.attention_mask.sum(axis=1), kind="stable"))

    def _in_order(self, order: np.ndarray) -> Batch:
        ids, types, mask = (array[order] for array in self[:3])
        numbers = None if self.numbers is None else self.numbers[order]
        of_teacher = None if self.of_teacher is None else self.of_teacher._in_order(order)
        return Batch(ids, types, mask, self.truncated, numbers, of_teacher)


class QKV(NamedTuple):
    """One layer's queries, keys and values before the head split: each [T, W] for
    the T tokens of a batch in order, or with the padding among them [B * L, W] or [B, L, W]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Wanted(NamedTuple):
    """What one pass through a model is to give."""

    states: Collection[int] = ()
    """Hidden states: 0 the embeddings, n the output of the n-th layer."""
    qkv: Collection[int] = ()
    """Layers, from 0, whose Q, K, V are wanted."""
    logits: bool = False
    """What the head says."""
    at: np.ndarray | None = None
    """int64 [P], which of the batch's B * L positions a head of tokens gives logits of; without, all tokens."""
    padded: bool = False
    """Whether padding runs along (though no token attends to it): tokens are then all B * L positions."""


class Captured(NamedTuple):
    """What one pass gave, each of what was wanted; T is B * L where padding ran along."""

    states: dict[int, Tensor]
    """[T, D] each."""
    qkv: dict[int, QKV]
    """[T, heads * head size of the layer] each."""
    logits: Tensor
    """Absent (None) unless wanted. In the backend's precision: [B, classes] (sequence classification), else of the T
    tokens, or the P asked for: labels (token classification), 2, start and end (question answering), or the
    vocabulary (masked_lm)."""


class Inputs(NamedTuple):
    """A padded batch on the device, as a module of the user's is given it: int64 [B, L] each."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor


class Outputs(NamedTuple):
    """What a module of the user's says of a padded batch, as far as it is to be compared."""

    logits: Tensor | None = None
    """[B, classes], or of each token [B, L, classes]."""
    states: Sequence[Tensor] = ()
    """Hidden states, numbered from 0 (a BERT's embeddings): [B, L, D] each."""
    qkv: Sequence[QKV] = ()
    """Queries, keys and values of every layer: [B, L, heads, head size] each."""


Forward = Callable[[Any, Inputs], Outputs]
"""Runs a module of the user's on a batch."""


class Ragged(NamedTuple):
    """Groups of vectors that are related, one group's after another's."""

    rows: np.ndarray
    """int64 [S], where the vectors are in Q, K or V; no row comes twice."""
    sizes: np.ndarray
    """int64 [G], vectors in each group; their sum is S."""
    weights: np.ndarray
    """float [G], what one row of one head's relation matrix counts."""
    bias: np.ndarray | None
    """float [S], added to the scores of each key."""
    heads: int
    """Relation heads a row has."""


class RelationKernel(Protocol):
    """A backend's own code for the divergence of groups, where it has one."""

    def add(
        self,
        teacher: tuple[Tensor, Tensor],
        student: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
        factor: float,
    ) -> Tensor:
        """The weighted divergence of a pair X, Y; `factor` times its gradient is added to `gradients`.

        Args:
            teacher, student: X and Y, contiguous, [R, heads * d], in single or low precision.
            gradients: float32, like the student's; the same tensor twice where X is Y.
        """


class StepReport(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping, without the loss scale."""
    skipped: bool = False
    """True if the scaled gradient overflowed and nothing was updated."""
    loss_scale: float | None = None
    """The scale the step ran with; None where losses are not scaled."""


class Trainable(ABC):
    """Weights that are trained together: a model's, or those of several that share an encoder."""

    rates: dict[str, float]
    """Learning rates of weights that have others than the model's, as multiples of it."""

    @abstractmethod
    def train(self, mode: bool = True) -> None:
        """Turns dropout on (or, with False, off)."""

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Every weight as float32, named and laid out as this module's docstring says."""

    @abstractmethod
    def load_weights(self, weights: Weights) -> list[str]:
        """Copies `weights` in; returns the names that the model has and `weights` lacks.

        Names the model does not have are ignored.

        Raises:
            InputError: a weight has another shape than the model's.
        """


class Model(Trainable):
    """A BERT-like encoder, with or without a head, from the framework's library, or a module of the user's."""

    config: Mapping[str, Any]
    """The model's settings under the keys of Hugging Face's ``config.json``."""
    shape: Shape
    head: Head | None

    @abstractmethod
    def run(self, batch: Batch, wanted: Wanted) -> Captured:
        """One walk through the layers, with one dropout, that ends when all that is wanted is there.

        Raises:
            ValueError: a layer or a head is wanted that the model has not.
        """

    @abstractmethod
    def add_projection(self, number: int, weight: np.ndarray, rate: float) -> Callable[[Tensor], Tensor]:
        """A linear layer x W^T + b, which is trained with the model and is among its weights, but not of its folder.

        Args:
            number: its name among projections.
            weight: W at first, float32 [out, in]; b is 0.
            rate: its learning rate, as a multiple of the model's.
        """

    @abstractmethod
    def export_onnx(self, path: Path) -> None:
        """Writes the model in float32 as an ONNX file of standard operators.

        It takes `ONNX_INPUTS`, int64 [batch, length], and gives `ONNX_OUTPUTS` (though perhaps under
        other names): logits as `Captured` says, but of padded batches, [batch, length, ...]; without
        a head, hidden states [batch, length, D] and the pooler's output [batch, D].
        """


Compute = Callable[[], "tuple[Tensor, dict[str, Tensor]]"]
"""Computes a loss, a differentiable scalar, and its named parts."""


class Optimizer(ABC):
    """AdamW (Loshchilov & Hutter, 2019) with decoupled decay, biases and norm
    weights excluded from it, clipping by global norm, and dynamic loss scaling
    where the backend trains in float16."""

    parallel: Any
    """What averages the gradients of several processes (torch's DistributedDataParallel, paddle's DataParallel); None
    of one."""

    def forward(self, compute: Compute, synchronise: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """What `compute` returns, for `backward`.

        Of several processes the next `backward` makes the gradient the mean of all if `synchronise`, which the last
        before a step must be. Weights that no process' loss has reached since the last step stay as they are.
        """
        if self.parallel is None:
            return compute()
        with nullcontext() if synchronise else self.parallel.no_sync():
            return self.parallel(compute)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the model's."""

    @abstractmethod
    def step(self, learning_rate: float) -> StepReport:
        """Clips, updates the model and clears its gradient. A gradient that is not finite changes nothing."""

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Moments, step counts and loss scale, keyed ``<weight>/<quantity>``."""

    @abstractmethod
    def load_state(self, state: Weights) -> None:
        """The reverse of `state`."""


class Backend(ABC):
    """One framework on one device.

    Args:
        device: ``auto`` (an accelerator if there is one), ``cpu``, ``gpu`` or ``xpu``.
        precision: what matrix products are computed in: ``float32``,
            ``bfloat16``, ``float16`` (with loss scaling), or ``auto``, the lowest
            the device gains from. Weights that train, soft-max, KL and norms stay
            in float32.

    Raises:
        InputError: the device is not there, or does not compute in that precision.
    """

    name: str
    device: str
    """The framework's name for it: ``cpu``, ``gpu`` (Paddle), ``cuda`` (PyTorch), ``xpu``."""
    precision: str
    """``float32``, ``bfloat16`` or ``float16``."""
    library: str
    """The name of the library that has the models."""
    activations: Sequence[str]
    """Values of a configuration's ``hidden_act`` that models compute."""

    relation_kernel: Callable[[Ragged], RelationKernel] | None = None
    """Fused code for the relation loss; without, it is computed by tensor operations."""

    row_multiple = 1
    """Packed tokens come in multiples of so many, the last of them fillers, where products of
    sizes that were met before run faster."""

    @property
    def block_elements(self) -> int:
        """Matrix elements that a computation in blocks best handles at a time: on a
        CPU what its caches hold, on others what keeps them busy."""
        return 1 << (19 if self.device == "cpu" else 24)

    @abstractmethod
    def __init__(self, device: str = "auto", precision: Precision = "float32") -> None: ...

    @staticmethod
    @abstractmethod
    def devices() -> list[Device]:
        """Every device that the framework sees."""

    @staticmethod
    @abstractmethod
    def versions() -> dict[str, str]:
        """Versions of the framework's packages."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far: what the framework took on the device; on a CPU the whole process."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Sets the random state of the framework (initial weights, dropout)."""

    @abstractmethod
    def tensor(self, array: np.ndarray) -> Tensor:
        """A tensor on the device, of the array's dtype."""

    @abstractmethod
    def numpy(self, tensor: Tensor) -> np.ndarray:
        """A copy as a NumPy array; low-precision tensors come as float32."""

    @abstractmethod
    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Zeros of a shape, with the dtype and device of `like`."""

    @abstractmethod
    def concat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Along the first axis."""

    @abstractmethod
    def log_softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        """The sum over N rows of -log softmax(logits)[label], in float32.

        Args:
            logits: [N, C].
            labels: int64 [N]; rows whose label is negative do not count.
        """

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many processes train together, in the framework's default process group."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process' tensor, by rank; outside of any graph. Only their lengths may differ."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns once every process has come here."""

    def total(self, counts: np.ndarray) -> np.ndarray:
        """The sum of all processes' counts."""
        if self.world_size == 1:
            return counts
        return np.sum([self.numpy(theirs) for theirs in self.gather(self.tensor(counts))], axis=0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, the first process is done before the others begin: what it leaves on disk they find."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    @abstractmethod
    def with_gradient(self, value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """`value` (a scalar) as a differentiable function of `inputs`, whose
        gradients are already known: d value / d inputs[i] = gradients[i]. It can
        be differentiated once, and `gradients` are used up by it."""

    @abstractmethod
    def no_grad(self) -> AbstractContextManager[Any]:
        """Inside, nothing is recorded for differentiation."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, models run in the backend's precision."""

    @abstractmethod
    def model(
        self,
        config: Mapping[str, Any],
        weights: Weights | None = None,
        head: Head | None = None,
        trainable: bool = True,
    ) -> Model:
        """A model of the framework's library, on the device, in evaluation mode.

        Args:
            config: ``model_type`` (``bert``, ``ernie``, ``ppminilm``; ``roberta``
                means RoBERTa-wwm-ext, whose architecture is BERT's) and the
                shape, under the keys of Hugging Face's ``config.json``; ``id2label``
                says how many classes a head has.
            weights: initial weights; random from the current seed without.
            trainable: without, linear weights are kept in the backend's precision.

        Raises:
            InputError: `weights` lack a weight of the encoder or do not fit.
        """

    @abstractmethod
    def join(self, models: Iterable[tuple[str, Model]]) -> Joined:
        """Models of one shape, each with a head of its own, on one encoder from now on: the first one's.

        Args:
            models: `model` made them, each with a name; they are taken one at a time, so that of encoders that are
                made as they are taken no more than two are there at once.
        """

    @abstractmethod
    def adapt(self, module: Any, forward: Forward) -> Model:
        """A module of the user's as a model, on the device, in evaluation mode.

        Args:
            module: a torch.nn.Module, or a paddle.nn.Layer that was made on the device; with the weights it has.
            forward: runs it; padding and all else of the pass is as it has it.

        Raises:
            InputError: `forward`, tried on a batch of two, gives something else than `Outputs` says.
        """

    @abstractmethod
    def reference(
        self, folder: Path, model_type: str, weights: Weights, head: Head | None
    ) -> Callable[[Batch], list[np.ndarray]]:
        """A folder's model as the framework's library itself makes it and runs it, from its own reading of
        ``config.json``: a function from a padded batch to `ONNX_OUTPUTS`, float32. It is there to compare with.

        Args:
            weights: the folder's; what the library reads of them could name files elsewhere, or run code.

        Raises:
            Exception: the library's, which share no class, if it has no such model or cannot load it.
        """

    @abstractmethod
    def optimizer(
        self,
        model: Trainable,
        *,
        weight_decay: float,
        adam_epsilon: float,
        max_grad_norm: float,
        loss_scale: float,
    ) -> Optimizer:
        """An optimizer of all of the model's weights; `loss_scale` is the first
        scale, used in float16 only; ``max_grad_norm <= 0`` clips nothing."""


def decays(weight: Tensor) -> bool:
    """Whether weight decay applies to a weight: not to vectors, which biases and the weights of norms are."""
    return len(weight.shape) > 1
