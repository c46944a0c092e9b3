"""What mutation tests share: breaks the sources on purpose, one way at a time, and demands that tests notice each.

A mutation's file is compiled from a broken copy, and linked with the objects of a program that has been built. Its tests
have to pass before with a copy that is not broken. Of a script that uses this:

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]
"""
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import typing


class Mutation(typing.NamedTuple):
    name: str
    file: str  # in SOURCE_DIR: a source, or a header, which is then broken for all that include it themselves
    old: str  # white space stands for any, as formatting may have moved line breaks
    new: str
    tests: str  # --gtest_filter
    program: str  # to be linked with the broken objects, or whatever else `build` takes it for
    which: int = 0  # of several places in which `old` is found


class Tree(typing.NamedTuple):
    source: pathlib.Path
    build: pathlib.Path

    @staticmethod
    def of_arguments():
        return Tree(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve())

    @functools.lru_cache(maxsize=None)
    def commands(self, program):
        return subprocess.run(["ninja", "-C", self.build, "-t", "commands", program], check=True, capture_output=True,
                              text=True).stdout.splitlines()

    def compile_commands(self, program, file):
        """Of `file` or, when it is a header, of all sources of the program that include it: {what is compiled: command}.
        A source may be compiled with others, by a file of the build's that includes them (ALTIPLANO_UNITY)."""
        found = {}
        is_header = file.endswith((".h", ".cuh"))
        for command in self.commands(program):
            match = re.search(r" -c (\S+)$", command)
            if match is None:
                continue
            compiled = self.build / match.group(1)
            sources = self.sources(compiled)
            if file in sources or is_header and any(f'#include "{file}"' in (self.source / source).read_text()
                                                    for source in sources):
                found[compiled] = command
        return found

    def sources(self, compiled):
        """The project's sources that compiling `compiled` reads as such, by their names in SOURCE_DIR."""
        together = re.findall(r'#include "(/\S+)"', compiled.read_text()) if compiled.name.startswith("unity_") else []
        return [str(pathlib.Path(each).relative_to(self.source)) for each in together or [compiled]
                if pathlib.Path(each).is_relative_to(self.source)]

    def link_command(self, program):
        command = next(c for c in reversed(self.commands(program)) if re.search(rf" -o \S*\b{program} ", c))
        return re.sub(r"^: && | && :$", "", command).removeprefix("ccache ")


def broken_text(text, mutation):
    """None when there is nothing to break."""
    pattern = r"\s+".join(re.escape(word) for word in mutation.old.split())
    matches = list(re.finditer(pattern, text))
    if len(matches) <= mutation.which:
        return None
    match = matches[mutation.which]
    return text[:match.start()] + mutation.new + text[match.end():]


def build_broken(tree, scratch, mutation, text):
    """The path of the tests' program, and what is to be in its environment."""
    copy = scratch / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text(text)
    objects, instead_of = [], set()
    for index, (compiled, command) in enumerate(tree.compile_commands(mutation.program, mutation.file).items()):
        objects.append(f"{scratch}/{index}.o")
        instead_of.update(re.findall(r" -o (\S+)", command))
        command = re.sub(r" -MD| -M[TF] \S+", "", command).replace("-Werror", "-w")
        command = re.sub(r" -o \S+", f" -o {objects[-1]}", command)
        command = command.replace(f"-I{tree.source}", f"-I{scratch} -I{tree.source}", 1)
        if compiled == tree.source / mutation.file:
            compiled = copy
        elif mutation.file in tree.sources(compiled):
            together = scratch / f"{index}.cc"
            together.write_text(compiled.read_text().replace(f'"{tree.source / mutation.file}"', f'"{copy}"'))
            compiled = together
        command = re.sub(r" -c \S+$", f" -c {compiled}", command)
        subprocess.run(command, shell=True, cwd=tree.build, check=True)
    if not objects:
        sys.exit(f"{mutation.name}: {mutation.program} is not compiled from {mutation.file}")
    program = scratch / mutation.program
    # Before the libraries, from which the linker takes only what is still missing; the program's own objects are all
    # linked, and tests must not be there twice.
    own = " ".join(word for word in tree.link_command(mutation.program).split(" ") if word not in instead_of)
    link = re.sub(r" -o \S+", f" {' '.join(objects)} -o {program}", own)
    subprocess.run(link, shell=True, cwd=tree.build, check=True)
    return program, {}


def notice(output):
    """The line of a failed run that says most."""
    for pattern in (r"broken invariant", r"deadlock in .*", r"kernel \w+, block .*", r"SUMMARY: .*", r"GPU \d+: .*",
                    r"tick \d+", r"The difference .*", r"\[  FAILED  \] .*", r"\S{1,200}: Failure"):
        if match := re.search(pattern, output):
            # Patterns of parts of a line mean all of it. They do not begin with .*, which takes minutes for long lines.
            begin = output.rfind("\n", 0, match.start()) + 1 if pattern in (r"broken invariant", r"tick \d+") else match.start()
            return output[begin:].split("\n", 1)[0].strip()[:160]
    return None


def run_tests(tree, mutation, text, environment, timeout, build):
    """How the tests end with such a file: exit status and output, None if they do not."""
    with tempfile.TemporaryDirectory() as folder:
        program, of_program = build(tree, pathlib.Path(folder), mutation, text)
        try:
            run = subprocess.run([program, f"--gtest_filter={mutation.tests}", "--gtest_fail_fast"], cwd=tree.build,
                                 env=os.environ | environment | of_program, capture_output=True, text=True, errors="replace", timeout=timeout)
        except subprocess.TimeoutExpired:
            return None
    return run.returncode, run.stdout + run.stderr


def caught(tree, mutation, passing, must_say, **how):
    """What is wrong, None if the tests notice. passing: tests that are known to pass with nothing broken."""
    whole = (tree.source / mutation.file).read_text()
    text = broken_text(whole, mutation)
    if text is None:
        return f"the text to break is no longer in {mutation.file}: {mutation.old}"
    if (mutation.program, mutation.tests) not in passing:  # or whatever is broken would be noticed
        ended = run_tests(tree, mutation, whole, **how)
        if ended is None or ended[0] != 0:
            return f"{mutation.tests} fails with nothing broken: {ended and (notice(ended[1]) or ended[0])}"
        if not re.search(r"\[  PASSED  \] [1-9]", ended[1]):
            return f"no test ran: {mutation.tests}"
        passing.add((mutation.program, mutation.tests))
    ended = run_tests(tree, mutation, text, **how)
    if ended is not None:
        status, output = ended
        if status == 0:
            return "NOT caught"
        if not re.search(must_say, output):
            return f"ended without a failed test: {output[-300:]}"
    print(f"caught: {mutation.name}: {'the test has no end' if ended is None else notice(output) or status}", flush=True)
    return None


def run(tree, mutations, environment=None, timeout=300, build=build_broken, must_say=""):
    """Exits with what was not caught. must_say: the pattern of what a run must say that fails as it should."""
    wanted = sys.argv[3:]
    survivors, passing = [], set()
    for mutation in mutations:
        if wanted and not any(w in mutation.name for w in wanted):
            continue
        try:
            problem = caught(tree, mutation, passing, must_say, environment=environment or {}, timeout=timeout, build=build)
        except subprocess.CalledProcessError:
            problem = "does not compile"
        if problem:
            survivors.append(f"{mutation.name}: {problem}")
            print(survivors[-1], flush=True)
    sys.exit("\n" + "\n".join(survivors) if survivors else 0)
