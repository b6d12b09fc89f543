"""Fonts for class names in pictures, in any script."""

import unicodedata


def find_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Find fonts for the characters that the usual font lacks, such as Chinese, Japanese and Korean ones.

    The search reads the font files themselves: matplotlib's own list is a cache, which lacks fonts that were installed
    later.

    Returns:
        The names of font families, from which matplotlib takes the first one that has a character; and the characters
        that no font has.
    """
    from matplotlib import font_manager

    # Spaces, the joiners of Persian words, and the variation selectors of emoji have no outline in any font.
    blank = {c for c in characters if unicodedata.category(c) in ("Zs", "Cf") or "\ufe00" <= c <= "\ufe0f"}
    characters = characters - blank
    usual = font_manager.FontProperties()
    families, missing = [*usual.get_family()], characters - _drawable(characters, font_manager.findfont(usual))
    files = font_manager.findSystemFonts() if missing else []
    drawable = {file: _drawable(missing, file) for file in files if "LastResort" not in file}  # macOS's has only boxes
    # Fonts with most of the characters come first, and among equals those that look like the usual font.
    for file in sorted(drawable, key=lambda file: (-len(drawable[file]), "Sans" not in file, "Regular" not in file)):
        if drawable[file] & missing:
            font_manager.fontManager.addfont(file)
            families.append(font_manager.get_font(file).family_name)
            missing -= drawable[file]
    return families, missing


def _drawable(characters: set[str], file: str) -> set[str]:
    """Return the characters that a font has outlines for. matplotlib cannot draw bitmaps, as which emoji often come."""
    from matplotlib.font_manager import get_font

    def has_outline(character: str) -> bool:
        if not font.get_char_index(ord(character)):
            return False
        font.load_char(ord(character))
        return len(font.get_path()[0]) > 0

    try:
        font = get_font(file)
        return {character for character in characters if has_outline(character)}
    except (OSError, RuntimeError):  # the file is damaged, or has only bitmaps
        return set()
