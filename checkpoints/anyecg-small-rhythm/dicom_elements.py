"""The elements of a DICOM file by tag, read where they lie: `open_dicom(path)`. Values are loaded when they are asked for.

pydicom is not used: it inflates a deflated file of any size, loads a long waveform whole, follows nested sequences until
Python's stack ends, and its warnings quote values, the patient's name among them.

Source: DICOM PS3.5, sections 6.2 (value representations) and 7 (encoding); PS3.10, section 7 (file format).
"""

import contextlib
import io
import math
import re
import zlib
from typing import NamedTuple

from .regular_files import open_regular

_START = 128  # bytes before "DICM"
_META_GROUP = 0x0002
_LAST_GROUP = 0x5400  # waveforms; what follows, images, is not looked at
_TRANSFER_SYNTAX = (0x0002, 0x0010)
_CHARACTER_SET = (0x0008, 0x0005)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_LONG_FORMS = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UC", "UN", "UR", "UT", "SV", "UV"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT_AND_ORDER = {
    "1.2.840.10008.1.2": (False, "little"),
    "1.2.840.10008.1.2.1": (True, "little"),
    "1.2.840.10008.1.2.2": (True, "big"),
    _DEFLATED: (True, "little"),
}
_DEEPEST = 12  # sequences within sequences
_MOST_ELEMENTS = 500_000
_LONGEST_TEXT = 65_536
_LARGEST_INFLATED = 16_000_000  # bytes, of a small file; of a large one this many times its size:
_LARGEST_RATIO = 30
_DECIMAL = re.compile(r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?")
_CODECS = {
    "ISO_IR 192": "utf-8", "GB18030": "gb18030", "GBK": "gbk", "ISO_IR 101": "iso8859_2", "ISO_IR 109": "iso8859_3",
    "ISO_IR 110": "iso8859_4", "ISO_IR 144": "iso8859_5", "ISO_IR 127": "iso8859_6", "ISO_IR 126": "iso8859_7",
    "ISO_IR 138": "iso8859_8", "ISO_IR 148": "iso8859_9", "ISO_IR 203": "iso8859_15", "ISO_IR 166": "iso8859_11",
    "ISO_IR 13": "shift_jis", "ISO 2022 IR 87": "iso2022_jp", "ISO 2022 IR 149": "euc_kr", "ISO 2022 IR 58": "gb2312",
}  # fmt: skip


class Element(NamedTuple):
    """Where a value lies in the file."""

    start: int
    length: int


@contextlib.contextmanager
def open_dicom(path, sequences):
    """Yield the `DicomFile` at `path`; it is closed at the end of the `with` block.

    Args:
        path (`pathlib.Path`): a DICOM file with its preamble.
        sequences (set of tags): the sequences to look into; others are passed over.

    Raises:
        ValueError: the elements contradict each other, or the transfer syntax is not read.
        OSError: there is no such regular file.
    """
    with open_regular(path) as file:
        yield DicomFile(file, path, sequences)


class DicomFile:
    """A DICOM file: `elements` maps tags `(group, element)` to `Element`s or, for sequences, lists of such maps.

    `ends_early` tells whether the last element is longer than what is there.
    """

    def __init__(self, file, path, sequences):
        self.path, self.ends_early = path, False
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        self._sequences, self._num_elements, self._codec = sequences, 0, None
        explicit, self.byte_order, position = True, "little", _START + 4
        meta, position = self._read_elements(position, self._size, 0, explicit, only_group=_META_GROUP)
        syntax = self.text(meta, _TRANSFER_SYNTAX)
        if syntax not in _EXPLICIT_AND_ORDER:
            raise ValueError(
                f"{path}: element (0002,0010), transfer syntax {re.sub('[^0-9.]', '', syntax)[:64] or 'absent'}, is not "
                f"read. Read are {', '.join(_EXPLICIT_AND_ORDER)}; dcmconv of DCMTK converts others."
            )
        if syntax == _DEFLATED:
            position = self._inflate(position)
        explicit, self.byte_order = _EXPLICIT_AND_ORDER[syntax]
        self.elements = self._read_elements(position, self._size, 0, explicit)[0]
        self._codec = _CODECS.get(self.text(self.elements, _CHARACTER_SET).split("\\")[-1])

    def items(self, elements, tag):
        """Return the items of a sequence; none where it is absent."""
        found = elements.get(tag)
        return found if isinstance(found, list) else []

    def bytes(self, elements, tag, longest=_LONGEST_TEXT):
        """Return the first bytes of a value; none where it is absent."""
        found = elements.get(tag)
        return self.read(found.start, min(found.length, longest)) if isinstance(found, Element) else b""

    def text(self, elements, tag):
        """Return a value as text, `""` where it is absent; Latin-1 where it is not in the file's character set."""
        value = self.bytes(elements, tag)
        try:
            text = value.decode(self._codec or "utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        return " ".join(text.replace("\0", " ").split())

    def decimal(self, elements, tag):
        """Return a decimal string as `float`, `None` where it is absent or empty; the first of several."""
        text = self.text(elements, tag).split("\\")[0].strip()
        if not text:
            return None
        if not _DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
            raise ValueError(f"{self.where(tag)}: no decimal number.")
        return float(text)

    def whole(self, elements, tag):
        """Return an unsigned binary number of 2 or 4 bytes, `None` where it is absent."""
        value = self.bytes(elements, tag)
        if len(value) not in (0, 2, 4):
            raise ValueError(f"{self.where(tag)}: {len(value)} bytes; a whole number has 2 or 4.")
        return int.from_bytes(value, self.byte_order) if value else None

    def where(self, tag):
        """Return file and tag, for a message."""
        return f"{self.path}, element ({tag[0]:04x},{tag[1]:04x})"

    def read(self, start, length):
        """Return bytes of the file, fewer at its end."""
        self._file.seek(start)
        return self._file.read(length)

    def _inflate(self, position):
        """Put the inflated rest of the file in place of the file; return where it begins."""
        largest = max(_LARGEST_INFLATED, _LARGEST_RATIO * self._size)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(self.read(position, self._size), largest)
        except zlib.error:
            raise ValueError(f"{self.path}: deflated, and damaged.") from None
        if inflater.unconsumed_tail:
            raise ValueError(f"{self.path}: {self._size} bytes that inflate to more than {largest}; not read.")
        self.ends_early = self.ends_early or not inflater.eof
        self._file, self._size = io.BytesIO(data), len(data)
        return 0

    def _read_elements(self, position, end, depth, explicit, only_group=None):
        """Return the elements from `position` up to `end` or to an item's end mark, and where they end."""
        elements = {}
        while position + 8 <= end:
            tag, form, length, value = self._read_header(position, explicit)
            if tag == _ITEM_END:
                return elements, value
            if (only_group is not None and tag[0] != only_group) or (depth == 0 and tag[0] > _LAST_GROUP):
                return elements, position
            if form is not None and not (form.isalpha() and form.isupper()):
                raise ValueError(f"{self.where(tag)}: no value representation at byte {position + 4}; damaged.")
            if tag in self._sequences or length == _UNDEFINED:
                found, position = self._read_sequence(value, length, end, depth + 1, explicit and form != "UN")
            else:
                position = self._end(value, length, end, tag)
                found = Element(value, position - value)
            elements.setdefault(tag, found)
        return elements, position

    def _read_sequence(self, position, length, end, depth, explicit):
        """Return the items of a sequence, and where it ends."""
        if depth > _DEEPEST:
            raise ValueError(f"{self.path}: sequences nested deeper than {_DEEPEST}; not read.")
        end = end if length == _UNDEFINED else self._end(position, length, end, _ITEM)
        items = []
        while position + 8 <= end:
            tag, _, length, value = self._read_header(position, explicit)
            if tag == _SEQUENCE_END:
                return items, value
            if tag != _ITEM:
                raise ValueError(f"{self.where(tag)}: at byte {position}, where an item of a sequence should begin.")
            item_end = end if length == _UNDEFINED else self._end(value, length, end, tag)
            item, position = self._read_elements(value, item_end, depth, explicit)
            position = position if length == _UNDEFINED else item_end
            items.append(item)
        return items, end

    def _read_header(self, position, explicit):
        """Return tag, value representation (`None` where the file leaves it out), length, and where the value begins."""
        self._num_elements += 1
        if self._num_elements > _MOST_ELEMENTS:
            raise ValueError(f"{self.path}: more than {_MOST_ELEMENTS} elements; not read.")
        data, order = self.read(position, 12), self.byte_order
        tag = (int.from_bytes(data[:2], order), int.from_bytes(data[2:4], order))
        if not explicit or tag[0] == _ITEM[0]:
            return tag, None, int.from_bytes(data[4:8], order), position + 8
        form = data[4:6].decode("latin-1")
        if form in _LONG_FORMS:
            return tag, form, int.from_bytes(data[8:12], order), position + 12
        return tag, form, int.from_bytes(data[6:8], order), position + 8

    def _end(self, position, length, end, tag):
        """Return where a value ends; in a file that was cut, at its end."""
        if position + length <= end:
            return position + length
        if end < self._size:
            raise ValueError(f"{self.where(tag)}: {length} bytes from byte {position} on; the item ends at {end}.")
        self.ends_early = True
        return max(position, end)
