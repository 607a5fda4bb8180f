"""Every way of attending gives what the definition gives, and the pieces of a past can be joined by their log-sum-exps."""

import pytest
import torch

from ropewalk.kernels.attend import LARGE, WAYS, Causal, _pieces, attend, plain, way

CASES = [("plain", None), ("plain", 3.0), ("flash on cpu", None), ("flex", None), ("flex", 3.0)]


def case(queries=7, keys=45, size=16, wide=16, masked=False):
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, rows, columns, generator=random) for rows, columns in ((queries, size), (keys, size), (keys, wide))
    )
    seen = None
    if masked:
        seen = torch.rand(queries, keys, generator=random) < 0.5
        seen[:, -1] = True
    return query, key, value, seen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wide", [16, 8])
@pytest.mark.parametrize(("name", "softcap"), CASES)
def test_every_way_gives_what_the_definition_gives(name, wide, softcap, masked):
    given = case(wide=wide, masked=masked)
    out, lse = WAYS[name](*given, 0.3, softcap)
    expected, weight = plain(*(x.double() if x is not None and x.is_floating_point() else x for x in given), 0.3, softcap)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, weight.float(), atol=1e-5, rtol=0)


def test_pieces_join_to_the_whole():
    query, key, value, _ = case()
    whole, weight = attend(query, key, value, None, 0.3)
    pieces = [attend(query, key[:, :, a:b], value[:, :, a:b], None, 0.3) for a, b in ((0, 20), (20, 45))]
    total = torch.logsumexp(torch.stack([lse for _, lse in pieces]), dim=0)
    joined = sum(out * (lse - total).exp().unsqueeze(-1) for out, lse in pieces)
    torch.testing.assert_close(joined, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(total, weight, atol=1e-6, rtol=0)


def test_the_way_follows_from_device_type_and_shape():
    query, key, value, _ = case()
    assert way(query, key, value, None, None) == "flash on cpu"
    assert way(query, key, value, None, 30.0) == "plain"
    assert way(query, key, value[..., :8], None, None) == "plain"
    many = torch.empty(1, 2, LARGE // 2 // 45 + 1, 16, device="meta")
    assert way(_on("cpu", many), key, value[..., :8], None, None) == "flash on cpu"
    cuda = [_on("cuda", x.to(torch.bfloat16)) for x in (query, key, value)]
    seen = torch.ones(7, 45, dtype=torch.bool)
    assert way(*cuda, None, None) == "flash"
    assert way(*cuda, seen, None) == "efficient"
    assert way(*cuda, seen, 30.0) == "flex"
    assert way(*(_on("cuda", x) for x in (query, key, value)), None, None) == "efficient"
    assert way(*(_on("cuda", x[..., :13]) for x in (query, key, value)), None, None) == "plain"


class _on:  # what `way` looks at, of a tensor that lies elsewhere
    def __init__(self, device, like):
        self.device, self.shape, self.dtype = torch.device(device), like.shape, like.dtype


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("new", "keys", "window"), [(5, 5, 0), (6, 20, 0), (700, 700, 40), (700, 739, 40), (3, 41, 40), (600, 900, 300)]
)
def test_what_is_causal_is_what_its_mask_says(new, keys, window, softcap):
    groups, causal = 3, Causal(new, window)
    query, key, value, _ = case(queries=groups * new, keys=keys)
    mask = causal.mask(groups * new, keys, "cpu")
    for row in (0, new // 2, new - 1):  # query `row` of every group belongs to key keys - new + row
        own = keys - new + row
        first = max(0, own - window + 1) if window else 0
        assert mask[row].nonzero().flatten().tolist() == list(range(first, own + 1))
        assert torch.equal(mask[row], mask[row + new])
    out, lse = attend(query, key, value, causal, 0.3, softcap)
    expected, weight = plain(query.double(), key.double(), value.double(), mask, 0.3, softcap)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, weight.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [64, 67])
def test_long_keys_are_read_in_pieces_and_it_makes_no_difference(monkeypatch, keys):
    given = case(queries=40, keys=keys)
    whole = attend(*given, 0.3)
    monkeypatch.setattr("ropewalk.kernels.attend.PIECE", 1 << 10)
    assert _pieces(given[0], given[1]) == 8
    assert _pieces(given[0][:, :, :32], given[1]) == 1
    assert _pieces(given[0].bfloat16(), given[1].bfloat16()) == 1
    for mine, truth in zip(attend(*given, 0.3), whole):
        torch.testing.assert_close(mine, truth, atol=1e-6, rtol=0)
