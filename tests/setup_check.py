"""The set-up as a stranger meets it: in an empty folder, with an empty home and nothing in the environment but HOME and PATH, the repository is cloned, README's commands
are run as they are read out of README.md, and what they print is compared with what README says.

    make check-setup                     # all of it: about a quarter of an hour on two cores
    make check-setup ARGS="--only train"

It is no part of `make test`, which it runs."""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parent.parent

def commands(readme:str) -> list[str]:
    "The commands of README's first block that are to be typed, without their comments."
    block = re.search(r'^```\n(make .*?)^```', readme, re.S | re.M)
    if not block: raise SystemExit('README.md: no block of commands that begins with make')
    return [line.split('#')[0].strip() for line in block[1].splitlines() if line.strip()]

def shown(readme:str) -> dict[str, list[str]]:
    "Method -> cells of the result table that README prints, as far as it prints them."
    table = re.search(r'^method .*?\n((?:.*\[.*\n)+)', readme, re.M)
    if not table: raise SystemExit('README.md: no table of results under the commands')
    return rows(table[0])

CELL = r'\d+\.\d(?: \[-?\d+\.\d, -?\d+\.\d\])'

def rows(text:str) -> dict[str, list[str]]:
    "Method -> cells, of every line that begins with a recipe and holds cells like `45.0 [42.8, 47.1]`."
    found = {}
    for line in text.splitlines():
        if (m := re.match(r'(\w[\w+]*) +\d', line)) and (cells := re.findall(CELL, line)): found[m[1]] = cells
    return found

def train_faults(printed:str, readme:str) -> list[str]:
    "What README says of training and the output lacks: the table to the last digit, and the epochs' lines but for their times."
    expected, got, faults = shown(readme), rows(printed), []
    for method, cells in expected.items():
        if method not in got: faults.append(f'no row of {method} in the table')
        elif got[method][:len(cells)] != cells: faults.append(f'{method}: {got[method][:len(cells)]}, README shows {cells}')
    lines = lambda text: {m[1]: m[2].split() for m in re.finditer(r'^ *(\d+/\d+) +(.*)$', text, re.M)}
    ours = lines(printed)
    for epoch, values in lines(readme.split('## ')[0]).items():
        values = [v for v in values if not re.search('[smh]$', v)]
        if [v for v in ours.get(epoch, []) if not re.search('[smh]$', v)][:len(values)] != values: faults.append(f'epoch {epoch}: {ours.get(epoch)}, README shows {values}')
    return faults

def test_faults(printed:str) -> list[str]:
    "Failures in the summaries of nbdev_test and pytest, or no summary."
    plain, faults = re.sub(r'\x1b\[[0-9;]*m', '', printed), []
    summary = re.findall(r'^=*\s*((?:\d+ \w+(?:, )?)+ in [\d.]+s.*)$', plain, re.M)
    if not summary: faults.append('no summary of pytest')
    elif re.search(r'\d+ (failed|error)', summary[-1]) or not re.search(r'\d+ passed', summary[-1]): faults.append(summary[-1])
    if 'Success.' not in plain: faults.append('nbdev_test does not say Success.')
    return faults

def run(command:str, folder:Path, home:Path, log:Path) -> tuple[int, str]:
    "A command in a shell with HOME and PATH alone."
    path = os.pathsep.join(p for p in os.environ['PATH'].split(os.pathsep) if not (Path(p).parent/'pyvenv.cfg').exists())
    with open(log, 'w') as out:
        code = subprocess.run(['env', '-i', f'HOME={home}', f'PATH={path}', 'bash', '-c', command], cwd=folder, stdout=out, stderr=subprocess.STDOUT).returncode
    return code, log.read_text()

def main():
    parser = argparse.ArgumentParser(description='README\'s commands in a fresh clone and an empty environment')
    parser.add_argument('--only', choices=('train', 'test'), help='one of the two commands')
    parser.add_argument('--repository', default=str(ROOT), help='what is cloned')
    parser.add_argument('--keep', action='store_true', help='keep the folder; it stays anyway when something is wrong')
    a = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix='cdfss-setup-'))
    home, clone, wrong = top/'home', top/'cdfss', []
    home.mkdir()
    code, printed = run(f"git clone -q {subprocess.list2cmdline([a.repository])} cdfss", top, home, top/'clone.txt')
    if code: raise SystemExit(f'git clone: {printed.strip()}')
    readme = (clone/'README.md').read_text()
    for command in commands(readme):
        kind = 'train' if 'train' in command else 'test'
        if a.only not in (None, kind): continue
        begun = time.monotonic()
        print(f'{command} ...', flush=True)
        code, printed = run(command, clone, home, top/f'{kind}.txt')
        faults = [f'exit code {code}'] if code else []
        faults += train_faults(printed, readme) if kind == 'train' else test_faults(printed)
        if 'Traceback (most recent call last)' in printed and kind == 'train': faults.append('a traceback')
        print(f'{command}: {"; ".join(faults) or "as README says"} ({time.monotonic() - begun:.0f} s, {top/f"{kind}.txt"})', flush=True)
        wrong += faults
    changed = subprocess.run(['git', 'status', '--porcelain'], cwd=clone, capture_output=True, text=True).stdout.strip()
    if changed: wrong.append(f'the clone is not as it was: {changed}'); print(wrong[-1])
    if not wrong and not a.keep: shutil.rmtree(top)
    sys.exit(bool(wrong))

if __name__ == '__main__': main()
