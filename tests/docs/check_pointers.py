#!/usr/bin/env python3
"""What the documents point at is there: files and headings that they link to, and in backticks files, names of functions,
tests and the like, and flags: of the command of altiplano that stands before them, or of any command or script.

    check_pointers.py ROOT [ALTIPLANO]     without the program no flags

Of decisions and of folders of measurements, which tell of their day, only the links.
"""
import fnmatch
import pathlib
import re
import subprocess
import sys

FOLDERS = ["cmake", "config", "docker", "docs", "kernels", "proto", "server", "tests"]
CODE = {"", ".cc", ".cmake", ".cu", ".h", ".proto", ".py", ".sbatch", ".sh", ".textproto", ".txt", ".yaml"}
# Machine code, examples of style and of names; what is other programs'.
FOREIGN = set("""HGMMA ATOMS POPC CAST SPIN ACQBULK members_ kConstants REPLICA _test.cc compile_commands.json
                 use_local_subchannel_pool NCCL_SOCKET_IFNAME python_out grpc_python_out map-by""".split())
PATH = re.compile(r"(?:[\w.*-]+/)+[\w.*-]*|[\w*-][\w.*-]*\.(?:cc|cu|h|json|md|proto|py|sbatch|sh|textproto|txt|yaml)")
FLAG = re.compile(r"(?<![\w-])--(?:\[no-\])?([a-z][\w-]*)")


def prose_and_blocks(text):
    """The text without its fenced blocks; their lines, those that a backslash continues as one."""
    blocks = re.findall(r"```.*?```", text, flags=re.S)
    return re.sub(r"```.*?```", "", text, flags=re.S), "\n".join(blocks).replace("\\\n", " ").splitlines()


def anchors(path):
    headings = re.findall(r"^#+ (.*)", prose_and_blocks(path.read_text())[0], flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(program):
    """By command."""
    usage = subprocess.check_output([program, "help"], text=True).split("Commands", 1)[1]
    return {command: {"help", *FLAG.findall(subprocess.check_output([program, *command.split(), "--help"], text=True))}
            for command in re.findall(r"^  (\w[\w-]*(?: [\w-]+)?)  +\S", usage, flags=re.M)}


def main():
    root = pathlib.Path(sys.argv[1]).resolve()
    flags = flags_of(sys.argv[2]) if len(sys.argv) > 2 else {}
    files = [p for p in root.iterdir() if p.is_file()] + [p for f in FOLDERS for p in (root / f).rglob("*") if p.is_file()]
    names = {f"/{p.relative_to(root)}" for p in files}
    names |= {f"/{folder.relative_to(root)}/" for p in files for folder in p.parents if root in folder.parents}
    code = "\n".join(p.read_text(errors="replace") for p in files if p.suffix in CODE and "/data/" not in str(p))
    words = set(re.findall(r"\w+", code + "\n".join(names))) | FOREIGN
    scripts = {*FLAG.findall((root / "run").read_text()), *re.findall(r'"--([a-z][\w-]*)"', code)}
    documents = [p for p in files if p.suffix == ".md" and root / "tests" not in p.parents]
    problems, pointers = [], 0
    for document in documents:
        name, (prose, lines) = document.relative_to(root), prose_and_blocks(document.read_text())
        links, spans = re.findall(r"\]\(([^)\s:]+)\)", prose), re.findall(r"`([^`\n]+)`", prose)
        for link in links:
            path, _, anchor = link.partition("#")
            to = document.parent / path if path else document
            if not to.exists() or (anchor and anchor not in anchors(to)):
                problems.append(f"{name}: {link} is not there")
        if re.match(r"docs/(adr|measurements/.*/)", str(name)):
            continue
        pointers += len(links) + len(spans)
        for token in " ".join(spans).replace("./", "").replace("/...", "/").split():
            if PATH.fullmatch(token) and not token.startswith("build/") and token not in FOREIGN:
                if not any(fnmatch.fnmatchcase(each.rstrip("/"), f"*/{token.rstrip('/')}") for each in names):
                    problems.append(f"{name}: no file is {token}")
        said = set(re.findall(r"(?<![-\w])[A-Za-z_]\w{3,}", " ".join(spans)))
        problems += [f"{name}: nothing is called {word}; another program's goes to FOREIGN" for word in sorted(said - words)
                     if word not in code]
        for text in spans + lines if flags else []:
            command = next((c for c in flags if re.search(rf"\baltiplano {c}\b", text)), None)
            known = FOREIGN.union(flags[command] if command else scripts.union(*flags.values()))
            problems += [f"{name}: no flag --{flag}: {text}" for flag in FLAG.findall(text)
                         if flag not in known and flag.removeprefix("no-") not in known]
    print("\n".join(problems) or f"{len(documents)} documents, {pointers} links and names: ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
