"""What a submission printed, as text that no terminal obeys."""

from __future__ import annotations


def shown(data: bytes, limit_bytes: int) -> str:
    """The end of `data` as text: newlines and tabs stay, all else that does not print is escaped.

    At most `limit_bytes` of UTF-8, however much the escapes add.
    """
    text = _without_half_character(data).decode("utf-8", errors="backslashreplace")
    escaped = "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
    encoded = escaped.encode()
    if len(encoded) <= limit_bytes:
        return escaped
    return encoded[len(encoded) - limit_bytes :].decode("utf-8", errors="ignore")


def _without_half_character(data: bytes) -> bytes:
    start = 0
    while start < min(3, len(data)) and data[start] & 0b1100_0000 == 0b1000_0000:
        start += 1
    return data[start:]
