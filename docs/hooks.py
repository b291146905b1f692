"""Put pages that lie outside docs/ on the site: results of benchmarks, CONTRIBUTING.md and CHANGELOG.md."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {  # a link as it works in the repository -> the page of the site
    "](../benchmarks/results/": "](results/",
    "](../CONTRIBUTING.md": "](CONTRIBUTING.md",
    "](../CHANGELOG.md": "](CHANGELOG.md",
}


def on_files(files, config):
    """Add the files as if they lay in docs/."""
    from mkdocs.structure.files import File  # here: tests read the other hook without mkdocs

    results = [path for path in (ROOT / "benchmarks" / "results").iterdir() if path.suffix in (".md", ".png")]
    for path in sorted([*results, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]):
        name = path.name if path.parent == ROOT else f"results/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links between docs/ and these pages point at their places on the site."""
    for link, place in PLACES.items():
        markdown = markdown.replace(link, place)
    if page.file.src_uri in ("CONTRIBUTING.md", "CHANGELOG.md"):
        markdown = markdown.replace("](docs/", "](").replace("](benchmarks/results/", "](results/")
    if page.file.src_uri.startswith("results/"):
        markdown = markdown.replace("](../../docs/", "](../")
    return markdown
