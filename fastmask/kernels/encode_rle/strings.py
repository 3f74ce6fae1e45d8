"""From the bits of columns to COCO's compressed strings: ends of runs, characters, then all strings together.

A pixel ends a run where its bit differs from the one before it. A cumulative sum over the words gives each end its
place; a second one, over the numbers of the string, gives each its first character. Three launches, because each needs
a total of the one before: of the ends of a mask, and of the characters of all masks.
"""

from __future__ import annotations

from fastmask.kernels._bits import popcount
from fastmask.kernels._runtime import jit, tl


@jit()
def _changes(words, index, total, left, columns, first_word, words_per_column, height, width):
    """Of words of a region: bits that differ from the pixel before, whether a run ends with the column, and positions.

    Returns:
        The bits; whether a run ends behind a column's last pixel, which no bit stands for; the position of bit 0; and
        that behind the last pixel.
    """
    word = tl.load(words + index, mask=index < total, other=0)
    before = tl.load(words + index - 1, mask=(index > 0) & (index < total), other=0)
    continues = (first_word == 0) & (words_per_column == (height + 31) // 32)  # a column, in the next one
    last_bit = (tl.minimum((first_word + words_per_column) * 32, height) - 1) & 31  # of a column's last word
    column = (index.to(tl.uint32) // tl.maximum(words_per_column, 1).to(tl.uint32)).to(tl.int32)  # 0: no words
    place = index - column * words_per_column
    is_last = place == words_per_column - 1
    carried = tl.where(place > 0, before >> 31, tl.where(continues, before >> last_bit, 0)) & 1
    bits = (word ^ ((word << 1) | carried)) & tl.where(is_last, (2 << last_bit) - 1, -1)
    position = (left + column) * height + (first_word + place) * 32
    column_end = position + last_bit + 1
    closes = is_last & ((word >> last_bit) & 1 != 0) & ~(continues & (column + 1 < columns))
    closes = closes & (index < total) & (column_end < height * width)
    return tl.where(index < total, bits, 0), closes.to(tl.int32), position, column_end


@jit(do_not_specialize=["programs_per_mask", "capacity", "height", "width", "outside"])
def store_ends_kernel(
    words,  # [B * N, W * ceil(H / 32)] int32
    regions,  # [B * N, 4] int32
    ends,  # [B * N, capacity] int32: positions behind runs
    runs,  # [B * N] int32: how many there are, also beyond the capacity; 0: no string
    programs_per_mask,
    capacity,
    height,
    width,
    outside,
    WORDS: tl.constexpr,
):
    # A program stores the ends in a block of words. Their places follow those of earlier blocks, which it counts.
    n = (tl.program_id(0) // programs_per_mask).to(tl.int64)
    begin = (tl.program_id(0) % programs_per_mask) * WORDS
    region = regions + n * 4
    left, columns = tl.load(region), tl.load(region + 1)
    first_word, per_column = tl.load(region + 2), tl.load(region + 3)
    total = tl.maximum(columns, 0) * per_column
    if (begin < total) | (begin == 0):
        words += n * (width * ((height + 31) // 32))
        ends += n * capacity
        lane = tl.arange(0, WORDS)
        counted = tl.zeros((WORDS,), tl.int32)
        for earlier in range(0, begin, WORDS):
            bits, closes, _, _ = _changes(
                words, earlier + lane, total, left, columns, first_word, per_column, height, width
            )
            counted += popcount(bits) + closes
        # Where pixels outside are 1, bits are inverted. The first run, of zeros, is empty unless the first bit is set.
        inverted = (outside != 0) & (columns >= 0) & (height * width > 0)
        first = tl.load(words, mask=inverted & (total > 0) & (left == 0) & (first_word == 0), other=0) & 1
        tl.store(ends, 0, mask=inverted & (begin == 0) & (first == 0))
        slots = tl.sum(counted, 0) + tl.where(inverted, 1 - 2 * first, 0)

        bits, closes, position, column_end = _changes(
            words, begin + lane, total, left, columns, first_word, per_column, height, width
        )
        number = popcount(bits)
        added = number + closes
        slot = slots + tl.cumsum(added, 0) - added
        last_slot = slot + number
        tl.store(ends + last_slot, column_end, mask=(closes != 0) & (last_slot >= 0) & (last_slot < capacity))
        for _ in range(tl.max(number, 0)):
            lowest = bits & -bits
            stored = (bits != 0) & (slot >= 0) & (slot < capacity)
            tl.store(ends + slot, position + popcount(lowest - 1), mask=stored)
            bits ^= lowest
            slot += 1
        if begin + WORDS >= total:
            slots += tl.sum(added, 0)
            tl.store(ends + slots, height * width, mask=slots < capacity)
            tl.store(runs + n, tl.where(columns >= 0, slots + 1, 0))


@jit(do_not_specialize=["capacity", "pixels"])
def store_characters_kernel(
    ends,  # [B * N, capacity] int32
    runs,  # [B * N] int32
    rows,  # [B * N, capacity] uint8
    lengths,  # [B * N]
    capacity,
    pixels,
    RUNS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    ends += n * capacity
    row = rows + n * capacity
    num_runs = tl.load(runs + n)
    length = 0
    for begin in range(0, tl.minimum(num_runs, capacity), RUNS):
        index = begin + tl.arange(0, RUNS)
        end, inside = ends + index, index < tl.minimum(num_runs, capacity)
        last = tl.load(end, mask=inside, other=0)
        first = tl.load(end - 1, mask=inside & (index > 0), other=0)
        last_before = tl.load(end - 2, mask=inside & (index > 2), other=0)
        first_before = tl.load(end - 3, mask=inside & (index > 2), other=0)
        number = (last - first) - (last_before - first_before)
        magnitude = number ^ (number >> 31)  # -1 needs as many groups as 0
        groups = inside.to(tl.int32)
        for i in tl.static_range(6):
            groups += (magnitude >= (16 << (5 * i))).to(tl.int32)
        character = length + tl.cumsum(groups, 0) - groups
        length += tl.sum(groups, 0)
        for _ in range(tl.max(groups, 0)):
            group = (number & 31) + tl.where(groups > 1, 80, 48)
            tl.store(row + character, group.to(tl.uint8), mask=(groups > 0) & (character < capacity))
            number >>= 5
            groups -= 1
            character += 1
    # A number of more than 5 bits belongs to a run of 16 pixels or more, or to the run that follows its successor. One
    # of e further characters needs 16 e pixels. So there is one character for each run, and one for 8 pixels.
    length = tl.where(num_runs > capacity, num_runs + pixels // 8, length)
    tl.store(lengths + n, length.to(tl.int64))


@jit(do_not_specialize=["num_strings", "capacity", "programs_per_string"])
def join_strings_kernel(
    rows,  # [S, capacity] uint8
    lengths,  # [S]
    strings,  # [S * capacity] uint8
    num_strings,
    capacity,
    programs_per_string,
    STRINGS: tl.constexpr,
    BYTES: tl.constexpr,
):
    n = tl.program_id(0) // programs_per_string
    part = tl.program_id(0) - n * programs_per_string
    begin = 0
    length = 0
    total = 0
    for first in range(0, num_strings, STRINGS):
        index = first + tl.arange(0, STRINGS)
        size = tl.load(lengths + index, mask=index < num_strings, other=0).to(tl.int32)
        size = tl.where(size <= capacity, size, 0)
        begin += tl.sum(tl.where(index < n, size, 0), 0)
        length += tl.sum(tl.where(index == n, size, 0), 0)
        total += tl.sum(size, 0)
    byte = part * BYTES + tl.arange(0, BYTES)
    inside = byte < length
    slot = n.to(tl.int64) * capacity + byte
    tl.store(strings + begin + byte, tl.load(rows + slot, mask=inside), mask=inside)
    tl.store(strings + slot, tl.zeros((BYTES,), tl.uint8), mask=(byte < capacity) & (slot >= total))
