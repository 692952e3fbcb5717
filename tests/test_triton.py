"""Model repositories for Triton, read by Triton's own definition of them."""

import importlib.util
from importlib.metadata import files

import onnxruntime
import pytest
from conftest import model_folder
from google.protobuf import text_format

from backends.files import InputError
from export.convert import OnnxArguments, export
from export.endpoints import model_metadata
from export.model import OnnxModel
from export.triton import TritonArguments, triton


@pytest.fixture(scope="module")
def definition():
    """tritonclient's ModelConfig, without the package around it, which wants gRPC."""
    path = next(file for file in files("tritonclient") if file.name == "model_config_pb2.py").locate()
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def exported(folder, **options):
    return export(OnnxArguments(str(model_folder(folder / "model")), str(folder / "student.onnx"), **options))


@pytest.mark.parametrize("tokenizer", ["none", "in-graph"])
def test_repository_says_what_the_model_is(tmp_path, definition, tokenizer):
    """Names, types and shapes are those of the ONNX file, the batch's axis left to Triton."""
    file = exported(tmp_path, tokenizer=tokenizer)
    folder = triton(
        TritonArguments(
            model=str(file), output=str(tmp_path / "repository"), name="a-name", instances=2, threads=3, device="gpu"
        )
    )
    assert (folder / "1" / "model.onnx").read_bytes() == file.read_bytes()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a-name"]
    config = text_format.Parse((folder / "config.pbtxt").read_text(), definition())
    assert (config.name, config.backend, config.max_batch_size) == ("a-name", "onnxruntime", 64)
    metadata = model_metadata(OnnxModel(file), "a-name")
    for repository, served in ((config.input, metadata["inputs"]), (config.output, metadata["outputs"])):
        assert [[-1, *put.dims] for put in repository] == [put["shape"] for put in served], (
            "clients send the same to both"
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(string)": "TYPE_STRING"}
    enum = definition.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    for repository, puts in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(put.name, enum.values_by_number[put.data_type].name) for put in repository] == [
            (put.name, types[put.type]) for put in puts
        ]
        for entry, put in zip(repository, puts):
            shape = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
            assert shape == [size if isinstance(size, int) else -1 for size in put.shape[1:]]
            assert len(entry.dims) > 0
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
    [group] = config.instance_group
    assert group.count == 2 and group.Kind.Name(group.kind) == "KIND_GPU"
    assert config.parameters["intra_op_thread_count"].string_value == "3"


def test_other_models_are_left_alone(tmp_path):
    file = exported(tmp_path)
    arguments = {"model": str(file), "output": str(tmp_path / "repository")}
    triton(TritonArguments(**arguments))
    with pytest.raises(InputError, match="repository/student: is there already; give another --name, or remove it"):
        triton(TritonArguments(**arguments))
    file = file.rename(tmp_path / "-小 student (1).onnx")
    written = triton(TritonArguments(**{**arguments, "model": str(file)}))
    arguments["model"] = str(file)
    assert written == tmp_path / "repository" / "_小_student__1_"
    with pytest.raises(InputError, match="--name '../x': expected letters, digits"):
        triton(TritonArguments(**arguments, name="../x"))
    with pytest.raises(InputError, match="--threads -2 --max_delay_us 1000: must not be negative"):
        TritonArguments(**arguments, threads=-2)
    with pytest.raises(InputError, match="--instances 0: must be at least 1"):
        TritonArguments(**arguments, instances=0)
