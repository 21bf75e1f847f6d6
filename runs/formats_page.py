"""Write docs/formats.md from the records: python runs/formats_page.py."""

from pathlib import Path

from microscale.report.formats_page import page

if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs" / "formats.md"
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target}")
