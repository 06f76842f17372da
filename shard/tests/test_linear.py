"""Matrix products, norms and vocabulary tables on one rank; the split over ranks is test_parallel.py's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tgi_shard.checkpoint import Checkpoint
from tgi_shard.errors import StartError
from tgi_shard.layers.embedding import VocabTables
from tgi_shard.layers.linear import DenseMethod, MatmulMaker, PackedMatmul, PlainMatmul, Rows, can_pack, split
from tgi_shard.layers.norm import RmsNormLayer
from tgi_shard.layers.weights import WeightReader
from tgi_shard.parallel import Parallel

torch.set_num_threads(1)
HALVES = [torch.bfloat16, torch.float16]


def reader(directory: Path, dtype: torch.dtype = torch.float32, **tensors: torch.Tensor) -> WeightReader:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    return WeightReader(Checkpoint.open(directory), torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 37, 51), (7, 64, 96), (300, 20, 3)])
def test_a_packed_product_is_the_plain_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    if not can_pack(weight):
        pytest.skip("this CPU has no oneDNN kernel for packed weights of this type")
    x = torch.randn(rows, inputs).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    with torch.inference_mode():
        got, expected = PackedMatmul(weight, bias)(x), PlainMatmul(weight, bias)(x)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 4864])  # oneDNN splits the sum of a single row when it is long
def test_a_row_of_a_packed_product_does_not_depend_on_the_other_rows(inputs: int, dtype: torch.dtype) -> None:
    weight = torch.randn(200, inputs).to(dtype)
    if not can_pack(weight):
        pytest.skip("this CPU has no oneDNN kernel for packed weights of this type")
    matmul, x = MatmulMaker().make(weight, None), torch.randn(130, inputs).to(dtype)
    with torch.inference_mode():
        together = matmul(x)
        for rows in (1, 2, 3, 8, 33, 129):
            assert torch.equal(matmul(x[:rows].contiguous()), together[:rows])


def test_parts_are_stacked_after_they_are_sliced(tmp_path: Path) -> None:
    q, k = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3) + 100
    names = {"q__weight": q, "q__bias": q[:, 0].clone(), "k__weight": k, "k__bias": k[:, 0].clone()}
    method = DenseMethod(reader(tmp_path, **names), MatmulMaker())
    matmul = method.column([Rows("q", 1, 3), Rows("k", 0, 1)], bias=True)
    expected = torch.cat((q[1:3], k[:1])).T + torch.cat((q[1:3, 0], k[:1, 0]))
    torch.testing.assert_close(matmul(torch.eye(3)), expected)


def test_a_row_split_matrix_reads_its_columns(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    method = DenseMethod(reader(tmp_path, o__weight=weight, o__bias=torch.ones(3)), MatmulMaker())
    torch.testing.assert_close(method.row("o", slice(2, 4), bias=False)(torch.eye(2)), weight[:, 2:].T)
    torch.testing.assert_close(method.row("o", slice(2, 4), bias=True)(torch.eye(2)), weight[:, 2:].T + 1)


def test_what_ranks_cannot_share_equally_names_the_flag() -> None:
    with pytest.raises(StartError, match=r"`--num-shard` 4 does not divide the feed-forward size \(10\)"):
        split(10, Parallel(rank=0, world_size=4), "the feed-forward size")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    reference = LlamaRMSNorm(33, eps=1e-5).to(dtype)
    with torch.no_grad():
        reference.weight.copy_(torch.randn(33))
        x = (torch.randn(5, 33) * 3).to(dtype)
        got = RmsNormLayer(reference.weight, 1e-5)(x)
        # In half precision transformers rounds once more, before the weight.
        tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 2
        torch.testing.assert_close(got, reference(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_tables_embed_and_score_from_one_tensor_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(70, 24).to(torch.bfloat16)
    tables = VocabTables(reader(tmp_path, dtype, embed__weight=table), MatmulMaker(), 70, Parallel.single())
    embedding, head = tables.tied("embed")
    ids = torch.tensor([69, 0, 3, 3])
    with torch.inference_mode():
        assert torch.equal(embedding(ids), table.to(dtype)[ids])
        logits = head(embedding(ids))
    assert logits.shape == (4, 70)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, table.float()[ids] @ table.float().T, atol=1e-1, rtol=1e-2)
    assert (embedding.num_bytes, head.num_bytes) == (0, 128 * 24 * dtype.itemsize)  # the table stays in the file
