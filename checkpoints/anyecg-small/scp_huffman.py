"""The entropy coding of SCP-ECG: Huffman tables, bit streams to integers, differences to amplitudes.

Source: EN 1064 / ISO 11073-91064, 5.5 (tables, their bit order) and Annex C (default table, differences).
"""

import functools

import numpy as np

DEFAULT_TABLE = 19999  # stands in place of the number of tables
LONGEST_CODE = 16  # bits of a prefix, and of the number that may follow it
_CODE_BYTES = 9  # of one code in section 2
_MOST_TABLES = 16  # a file of a few bytes could name thousands


def read_tables(body, where):
    """Return the Huffman tables of section 2, each a list of `2**16` entries (see `_table`), to `decode_huffman`.

    Raises:
        ValueError: the section is cut, or a table has codes that contradict each other or that are too long.
    """
    count = int.from_bytes(body[:2], "little")
    if count == DEFAULT_TABLE:
        return [default_table()]
    if not 1 <= count <= _MOST_TABLES:
        raise ValueError(
            f"{where}: {count} Huffman tables; read are 1 to {_MOST_TABLES}, or the default ({DEFAULT_TABLE})."
        )
    tables, position = [], 2
    while len(tables) < count:
        num_codes = int.from_bytes(body[position : position + 2], "little")
        end = position + 2 + num_codes * _CODE_BYTES
        if num_codes == 0 or end > len(body):
            raise ValueError(f"{where}: ends within Huffman table {len(tables) + 1} of {count}, or this one is empty.")
        stored = [body[start : start + _CODE_BYTES] for start in range(position + 2, end, _CODE_BYTES)]
        tables.append(_table([_parse_code(code, where) for code in stored], where))
        position = end
    return tables


@functools.cache
def default_table():
    """Return the default table: 0 is `0`, n is n ones, `0` and a sign; 9 ones announce a number of 8 or 16 bits."""
    codes = [(1, 0b0, 0, 0, True)]
    for magnitude in range(1, 9):
        ones = (1 << magnitude) - 1
        codes.append((magnitude + 2, ones << 2, 0, magnitude, True))
        codes.append((magnitude + 2, ones << 2 | 1, 0, -magnitude, True))
    codes += [(10, 0b1111111110, 8, 0, True), (10, 0b1111111111, 16, 0, True)]
    return _table(codes, "default table")


def decode_huffman(data, count, tables, where):
    """Return up to `count` values, `np.ndarray` of int64; fewer where the data end before.

    Raises:
        ValueError: bits that are no code of the table, or a switch to a table that is not there.
    """
    windows, num_bits = _windows(data), 8 * len(data)
    table, position, values = tables[0], 0, []
    while len(values) < count and position < num_bits:
        code = table[windows[position]]
        if code is None:
            raise ValueError(f"{where}: the bits from {position} on are no code of the Huffman table; damaged.")
        prefix_bits, number_bits, value, is_value = code
        position += prefix_bits
        if position + number_bits > num_bits:
            break
        if not is_value:
            if not 1 <= value <= len(tables):
                raise ValueError(f"{where}: switches to Huffman table {value} of {len(tables)}.")
            table = tables[value - 1]
            continue
        if number_bits:
            number = windows[position] >> LONGEST_CODE - number_bits
            half = 1 << number_bits - 1
            value += (number ^ half) - half  # two's complement
            position += number_bits
        values.append(value)
    return np.array(values, np.int64)


def undo_differences(values, order):
    """Return the amplitudes whose differences of `order` 0, 1 or 2 are `values`; the first `order` are as they were.

    The format's arithmetic is that of 16 bits: what overflows in the encoder comes back here.
    """
    steps = values.copy()
    if order == 2:
        steps[1:2] -= steps[:1]
        steps[1:] = np.cumsum(steps[1:])
    if order:
        steps = np.cumsum(steps)
    return steps.astype(np.int16).astype(np.int64)


def _parse_code(stored, where):
    """Return `(prefix bits, prefix, bits of the number, value, whether it is a value)` of a code in section 2."""
    prefix_bits, all_bits, is_value = stored[0], stored[1], stored[2] != 0
    number_bits = all_bits - prefix_bits
    if not (1 <= prefix_bits <= LONGEST_CODE and 0 <= number_bits <= LONGEST_CODE):
        raise ValueError(
            f"{where}: a code of {prefix_bits} bits, {all_bits} in all; 1 to {LONGEST_CODE} and as many more."
        )
    value = int.from_bytes(stored[3:5], "little", signed=True)
    first_bit_lowest = int.from_bytes(stored[5:9], "little")
    prefix = sum((first_bit_lowest >> place & 1) << prefix_bits - 1 - place for place in range(prefix_bits))
    return prefix_bits, prefix, number_bits, value, is_value


def _table(codes, where):
    """Return what each possible 16 bits begin with: `(prefix bits, bits of the number, value, is it a value)`, or None."""
    table = [None] * (1 << LONGEST_CODE)
    for prefix_bits, prefix, number_bits, value, is_value in codes:
        width = 1 << LONGEST_CODE - prefix_bits
        taken = slice(prefix * width, (prefix + 1) * width)
        if any(table[taken]):
            raise ValueError(f"{where}: a Huffman code begins with another one.")
        table[taken] = [(prefix_bits, number_bits, value, is_value)] * width
    return table


def _windows(data):
    """Return for each bit of `data` the number that it and the 15 bits after it make; zeros follow the end."""
    padded = np.frombuffer(bytes(data) + bytes(2), np.uint8).astype(np.int32)
    three_bytes = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    return (three_bytes[:, None] >> np.arange(8, 0, -1) & 0xFFFF).ravel().tolist()
