"""Packed codes come back as they were and take no more room than their bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.quantization.packing import pack_bits, unpack_bits


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    return torch.tensor(values, dtype=torch.uint8), bits


@settings(deadline=None)
@given(codes_and_bits())
def test_unpacking_returns_the_codes(case):
    codes, bits = case
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, len(codes)), codes)


@settings(deadline=None)
@given(codes_and_bits())
def test_packed_size_is_the_bits_rounded_up_to_a_byte(case):
    codes, bits = case
    assert pack_bits(codes, bits).numel() == -(-len(codes) * bits // 8)


def test_a_known_pattern_is_packed_most_significant_bit_first():
    codes = torch.tensor([0b101, 0b001, 0b110], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [0b10100111, 0b00000000]


def test_a_strided_weight_is_packed_in_row_major_order():
    codes = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    packed = pack_bits(codes.to(memory_format=torch.channels_last), 5)
    assert unpack_bits(packed, 5, 24).tolist() == list(range(24))


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits):
    with pytest.raises(ValueError, match=f"code {2**bits} does not fit in {bits} bits"):
        pack_bits(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


@pytest.mark.parametrize("size", [2, 4])
def test_a_wrong_number_of_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} bytes cannot hold 5 codes of 4 bits, which take 3"):
        unpack_bits(torch.zeros(size, dtype=torch.uint8), 4, 5)
