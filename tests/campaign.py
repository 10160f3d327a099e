"""Fault campaign: runs are killed, starved of disk, damaged, doubled and set in other times at random moments, and have to end as the undisturbed run did.

    make campaign ARGS="--trials 300 --seed 0"

Of each trial is asked: is nothing reported as complete that differs from the undisturbed run; is the run, started again, equal to it, to the byte or last digit, but for
clock times; is no finished step or block computed again; does every end that is not the run's own say why in one line. Trials are tiny runs in processes forked from
a server that has torch loaded. The moments come from the seed: a number of function calls, a number of file operations, or a share of the run's duration."""
import argparse, collections, contextlib, functools, json, multiprocessing, os, random, resource, shutil, signal, subprocess, sys, tempfile, threading, time, traceback
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
import pandas as pd
from safetensors.torch import load_file
import torch
from timm.models.resnet import BasicBlock, ResNet
from cdfss.basics import InputError
from cdfss.engine import evaluate as evaluate_module, fit as fit_module, train as train_module
from cdfss.engine.runs import Run
from cdfss.models.backbones import NETS
from fakes import polyps, voc

TIMES = ['seconds', 'fit_seconds']
VALUES = dict(method='ssp+lem+lcm', backbone='campaign', weights='none', freeze='none', size=32, epochs=2, fit_episodes=8, batch=4, lr=.01, test_episodes=4, track_episodes=3,
              samples=1, targets='kvasir', shots='1', keep_epochs=True, workers=1)

@NETS.register('campaign')
def campaign_net(**kw) -> ResNet:
    "Small enough that a run takes a second."
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 8, 8, 8), stem_width=4, **kw)

def data(root:Path) -> Path:
    "A source and a target."
    names = [f'v{i}' for i in range(15)]
    return polyps(voc(root, {n: [1 + i % 3, 1 + (i + 1) % 3] for i, n in enumerate(names)}, names[:9], names[9:]), 6, (36, 28))

# ---- in the child -----------------------------------------------------------------------------------------------------------
CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.link'}

def child(values:dict, cache:str, plan:dict, events):
    """Train the settings. `plan`: `moment` ('calls' or 'files', n; or 'event', its name) and what is done then, `act` ('kill', 'term', 'int', 'wipe', 'jump'); `clock`, seconds by which the clock
    is wrong; `file_size`, a limit on files in bytes; `untouched`, a folder in which no file may be opened for writing. State is saved at every step, evaluation in blocks of one episode."""
    os.environ['CDFSS_CACHE'] = cache
    torch.set_num_threads(1)
    os.dup2(os.open(plan['log'], os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    train_module.fit = functools.partial(train_module.fit, save_every=0.)
    train_module.evaluate = functools.partial(train_module.evaluate, block=1)
    count, (unit, last), real, offset = 0, plan.get('moment') or ('none', None), time.time, [plan.get('clock', 0)]
    def tell(event):
        events.send((event, count))
        if unit == 'event' and event == last: act()

    def act():
        what = plan['act']
        if what == 'wipe': shutil.rmtree(cache, ignore_errors=True)
        elif what == 'jump': offset[0] -= plan['jump']
        else: os.kill(os.getpid(), {'kill': signal.SIGKILL, 'term': signal.SIGTERM, 'int': signal.SIGINT}[what])

    def tick(*_):
        nonlocal count
        count += 1
        if count == last: act()

    def audit(event, args):
        writes = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in CHANGES) or not isinstance(args[0], (str, bytes, os.PathLike)): return
        path = os.fsdecode(args[0])
        if plan.get('untouched') and path.startswith(plan['untouched']): raise PermissionError(30, 'Read-only file system', path)
        if unit == 'files' and path.startswith((values['runs'], cache)): tick()

    def counted(module, name, event):
        whole = getattr(module, name)
        @functools.wraps(whole)
        def wrapped(*a, **kw):
            tell(event)
            return whole(*a, **kw)
        setattr(module, name, wrapped)

    train_module.environment = lambda device: dict(commit=None, dirty=False, device=device, torch=torch.__version__)      # a third of a run's time
    counted(fit_module, 'autocast', 'step')                      # entered once a step; batches are read ahead
    counted(evaluate_module, 'predict', 'block')
    if 'clock' in plan or plan.get('act') == 'jump': time.time = lambda: real() + offset[0]
    if plan.get('file_size'):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan['file_size'], resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if unit == 'files' or plan.get('untouched'): sys.addaudithook(audit)
    if unit == 'calls': sys.setprofile(tick)
    try:
        run = train_module.train(train_module.TrainSettings(**values), on_epoch=lambda row: tell(f"epoch {row['epoch']}"), say=lambda line: tell(f'said {line}'))
        sys.setprofile(None)
        tell(f'done {run.path}')
    except InputError as e: tell(f'refused {e}')
    except KeyboardInterrupt: tell('interrupted')
    except BaseException as e: tell(f'broke {"".join(traceback.format_exception(e))[-3000:]}')

# ---- around it --------------------------------------------------------------------------------------------------------------
@dataclass
class Start:
    "How one start of the run ended."
    code: int
    events: list[tuple[str, int]]

    def said(self, head:str) -> str|None: return next((e for e, _ in self.events if e.startswith(head)), None)
    def number(self, event:str) -> int: return sum(e == event for e, _ in self.events)
    @property
    def end(self) -> str:
        "done, refused, interrupted, broke, or the signal."
        for word in ('done', 'refused', 'interrupted', 'broke'):
            if self.said(word): return word
        return signal.Signals(-self.code).name if self.code < 0 else f'exit code {self.code}'

def server():
    "A process that has torch loaded and is forked for every start; a program without threads of its own is forked itself."
    if threading.active_count() == 1: return multiprocessing.get_context('fork')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['campaign'])
    return context

class Running:
    "A start that is under way."
    def __init__(self, context, values:dict, cache:Path, plan:dict):
        self.near, far = context.Pipe(duplex=False)
        self.process = context.Process(target=child, args=(values, str(cache), plan, far))
        self.process.start()
        far.close()
        self.begun = time.perf_counter()

    def signal(self, number:int):
        if self.process.exitcode is None: os.kill(self.process.pid, number)

    def wait(self, limit:float=180) -> Start:
        self.process.join(limit)
        if hung := self.process.exitcode is None: self.process.kill()
        self.process.join()
        events = []                                                         # all of them fit into a pipe, so that they can be read now
        with contextlib.suppress(EOFError):
            while True: events.append(self.near.recv())
        self.near.close()
        return Start(self.process.exitcode, [*events, *([('broke: it hangs', 0)] if hung else [])])

def mountable() -> bool:
    "Whether a tmpfs can be mounted here."
    with tempfile.TemporaryDirectory() as d:
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'cdfss', d], capture_output=True) if shutil.which('mount') else None
        if done is None or done.returncode: return False
        subprocess.run(['umount', d], check=True)
        return True

@contextlib.contextmanager
def mounted(folder:Path, *how:str):
    "Something mounted on a folder."
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(['mount', *how, str(folder)], check=True)
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)

def weights_of(path:Path) -> dict[str, list]: return {k: v.tolist() for k, v in sorted(load_file(path).items())}

def differences(a:Run, b:Run) -> list[str]:
    "What distinguishes two run folders, but for clock times and the environment; empty for equal ones."
    def files(r): return {p.relative_to(r.path).as_posix() for p in r.path.rglob('*') if p.is_file() and p.name != '.lock'}
    found = [f'{n} is in one of them only' for n in sorted(files(a) ^ files(b))]
    for name in sorted(files(a) & files(b)):
        if name in ('env.json', 'params.json', 'timing.json', 'files.json'): continue        # places and times; params: below
        if name.endswith(('.csv', '.parquet')):
            read = pd.read_csv if name.endswith('.csv') else pd.read_parquet
            frames = [read(r.path/name).drop(columns=TIMES, errors='ignore') for r in (a, b)]
            if not frames[0].equals(frames[1]): found.append(f'{name} differs')
        elif (a.path/name).read_bytes() != (b.path/name).read_bytes(): found.append(f'{name} differs')
    placed = ('data_root', 'runs')
    if not found and any(a.params[k] != b.params[k] for k in a.params if k not in placed): found.append('params.json differs')
    return found

def wrong(run:Run, reference:Run) -> list[str]:
    "What a run folder that is said to be complete gives to its readers, and should not: an error that is not one line is wrong too."
    found = []
    def tried(name, read, expected):
        try: value = read()
        except InputError as e:
            if '\n' in str(e): found.append(f'{name}: an error of several lines')
        except Exception as e: found.append(f'{name}: {type(e).__name__}: {e}')
        else:
            if not (value.equals(expected) if isinstance(value, pd.DataFrame) else value == expected): found.append(f'{name} is wrong')
    plain = lambda frame: frame.drop(columns=TIMES, errors='ignore')
    tried('metrics', lambda: run.metrics, reference.metrics)
    tried('history', lambda: plain(run.history), plain(reference.history))
    tried('episodes', lambda: plain(run.episodes), plain(reference.episodes))
    state = lambda r, epoch=None: {k: v.tolist() for k, v in train_module.load_segmenter(r, epoch=epoch).state_dict().items()}
    tried('weights', lambda: state(run), state(reference))
    tried('weights of epoch 1', lambda: state(run, 1), state(reference, 1))
    return found

@dataclass
class Trial:
    "What happened in one trial; `faults` is empty when all was as it should be."
    kind: str
    seed: int
    detail: str = ''
    starts: list[Start] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str: return ' > '.join(s.end for s in self.starts)

class Campaign:
    "The undisturbed run, and trials against it, in a folder."
    def __init__(self, folder:str|Path):
        self.folder, self.context = Path(folder), server()
        self.data, self.cache, self.mounts = data(self.folder/'data'), self.folder/'cache', mountable()
        self.number, self.totals = 0, {}
        runs = []
        for unit in ('none', 'calls', 'files', 'none'):                     # the first fills the cache
            place = self.folder/f'undisturbed {unit} {len(runs)}'
            start, seconds = self.start(place, self.cache, moment=(unit, None))
            if start.end != 'done': raise RuntimeError(f'the undisturbed run ends with {start.end}: {start.events[-1:]}')
            self.totals[unit] = start.events[-1][1]
            self.seconds, self.steps, self.blocks = seconds, start.number('step'), start.number('block')
            runs.append(Run(start.said('done').removeprefix('done ')))
        self.reference = runs[0]
        if found := [d for r in runs[1:] for d in differences(self.reference, r)]: raise RuntimeError(f'undisturbed runs differ: {found}')
        self.bytes = sum(p.stat().st_size for p in self.reference.path.rglob('*') if p.is_file())

    # -- tools of the trials
    def running(self, runs:Path, cache:Path, **plan) -> Running:
        values = VALUES | dict(data_root=str(plan.pop('root', self.data)), runs=str(runs))
        return Running(self.context, values, cache, plan | dict(log=str(self.folder/'stderr.txt')))

    def start(self, runs:Path, cache:Path, **plan) -> tuple[Start, float]:
        running = self.running(runs, cache, **plan)
        return running.wait(), time.perf_counter() - running.begun

    def moment(self, chance:random.Random, share:float=1.) -> tuple[str, int]:
        unit = chance.choice(['calls', 'files', 'files'])
        return unit, chance.randint(1, max(1, int(share*self.totals[unit])))

    def claims(self, run:Run) -> list[str]:
        "Faults of a folder that says it is complete."
        return [f'reported as complete, {d}' for d in wrong(run, self.reference)] if run.complete else []

    def stop(self, trial, chance, runs, cache, how, **plan) -> Start:
        "One start that is ended by a signal at a random moment, from inside or outside."
        name = {'kill': signal.SIGKILL, 'term': signal.SIGTERM, 'int': signal.SIGINT}[how]
        if chance.random() < .3:
            after = chance.uniform(.1, 1.)*self.seconds
            trial.detail += f' {how} after {after:.2f} s;'
            running = self.running(runs, cache, **plan)
            time.sleep(after)
            running.signal(name)
            started = running.wait()
        else:
            moment = self.moment(chance)
            trial.detail += f' {how} at {moment[1]} {moment[0]};'
            started, _ = self.start(runs, cache, moment=moment, act=how, **plan)
        trial.starts.append(started)
        return started

    def judged(self, trial:Trial, run:Run, lost:int|None=0) -> Trial:
        "The last start has to end as the undisturbed run; `lost` is how many starts may have lost the step or block they were in (None: any)."
        for s in trial.starts:
            if s.end == 'broke' or s.end.startswith('exit code') or any('broke' in e for e, _ in s.events): trial.faults.append((s.said('broke') or s.end).strip().split('\n')[-1])
            if (line := s.said('refused')) and '\n' in line: trial.faults.append(f'an error of several lines: {line}')
        last = trial.starts[-1]
        if last.end != 'done': trial.faults.append(f'the last start ends with {last.end}: {last.said("refused") or ""}')
        elif not run.complete: trial.faults.append('done, but not complete')
        else: trial.faults += differences(self.reference, run) or [f'reader: {d}' for d in wrong(run, self.reference)]
        if lost is not None:
            for word, usual in (('step', self.steps), ('block', self.blocks)):
                if (n := sum(s.number(word) for s in trial.starts)) > usual + lost: trial.faults.append(f'{n} {word}s, {usual} are needed and {lost} may be lost')
        return trial

    def try_out(self, kind:str, seed:int) -> Trial:
        "One trial in a folder of its own, which stays when there is a fault."
        self.number += 1
        home, chance, trial = self.folder/f'{self.number}', random.Random(f'{kind} {seed}'), Trial(kind, seed)
        runs, cache = home/'runs', home/'cache'
        shutil.copytree(self.cache, cache)
        run = Run(runs/self.reference.path.name)
        getattr(self, KINDS[kind])(trial, chance, home, runs, cache, run)
        if not trial.faults: shutil.rmtree(home, ignore_errors=True)
        return trial

    # -- the kinds
    def _signals(self, how, trial, chance, home, runs, cache, run):
        for _ in range(chance.randint(1, 3)):
            if self.stop(trial, chance, runs, cache, how).end == 'done': break
            trial.faults += self.claims(run)
        if trial.starts[-1].end != 'done': trial.starts.append(self.start(runs, cache)[0])
        self.judged(trial, run, len(trial.starts) - 1)

    def sigkill(self, *a): self._signals('kill', *a)
    def sigterm(self, *a): self._signals('term', *a)
    def sigint(self, *a): self._signals('int', *a)

    def disk_full(self, trial, chance, home, runs, cache, run):
        where, size = chance.choice(['runs', 'runs', 'cache']), 4096*chance.randint(1, max(2, int(1.1*self.bytes)//4096))
        trial.detail = f'{where}, {size} bytes, {"tmpfs" if self.mounts else "limit on file size"}'
        if where == 'cache': shutil.rmtree(cache)
        if self.mounts:
            with mounted(home/where, '-t', 'tmpfs', '-o', f'size={size}', 'cdfss'):
                trial.starts.append(self.start(runs, cache)[0])
                trial.faults += self.claims(run)
                if left := [p.name for p in home.rglob('*.part')]: trial.faults.append(f'left half written on a full disk: {left}')
                subprocess.run(['mount', '-o', 'remount,size=64m', str(home/where)], check=True)
                if trial.starts[-1].end != 'done': trial.starts.append(self.start(runs, cache)[0])
                self.judged(trial, run, 1)
        else:
            trial.starts.append(self.start(runs, cache, file_size=chance.randint(1, 2*max(p.stat().st_size for p in self.reference.path.rglob('*') if p.is_file())))[0])
            trial.faults += self.claims(run)
            if trial.starts[-1].end != 'done': trial.starts.append(self.start(runs, cache)[0])
            self.judged(trial, run, 1)

    def _spoil(self, trial, chance, run, cache, spoil) -> str:
        "Damages one file of the run, now and then of the cache; returns which."
        files = sorted(p for p in (cache if chance.random() < .2 else run.path).rglob('*') if p.is_file() and p.stat().st_size)
        if not files: return ''
        kinds = sorted({p.suffix for p in files})
        kind = chance.choice(kinds)                                         # evenly among kinds of files
        path = chance.choice([p for p in files if p.suffix == kind])
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        if spoil == 'cut': content = content[:at]
        else: content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        trial.detail += f" {path.relative_to(path.parents[1])} {'cut' if spoil == 'cut' else 'flipped'} at {at};"
        return path.relative_to(run.path).as_posix() if path.is_relative_to(run.path) else ''

    def _spoiled(self, spoil, trial, chance, home, runs, cache, run):
        if chance.random() < .35:                                           # of a finished run
            shutil.copytree(self.reference.path, run.path)
            self._spoil(trial, chance, run, cache, spoil)
            trial.faults += self.claims(run)
            trial.starts.append(self.start(runs, cache)[0])
            self.judged(trial, run, None)
        else:
            for _ in range(chance.randint(1, 2)):
                if self.stop(trial, chance, runs, cache, 'kill').end == 'done': break
            done = run.complete
            name = self._spoil(trial, chance, run, cache, spoil) if run.path.exists() else ''
            trial.faults += self.claims(run)
            trial.starts.append(self.start(runs, cache)[0])
            self.judged(trial, run, len(trial.starts) + 1 if name.startswith('resume/state') and not done else None)

    def truncated(self, *a): self._spoiled('cut', *a)
    def flipped(self, *a): self._spoiled('flip', *a)

    def clock(self, trial, chance, home, runs, cache, run):
        wrong_by = lambda: chance.choice([-1, 1])*chance.choice([30, 3600, 86400, 3e8])*chance.random()
        for _ in range(chance.randint(1, 2)):
            if self.stop(trial, chance, runs, cache, 'kill', clock=wrong_by()).end == 'done': break
            for p in chance.sample(files := sorted(p for f in (runs, cache) if f.exists() for p in f.rglob('*')), len(files)//2): os.utime(p, (t := time.time() + wrong_by(), t))
        if trial.starts[-1].end != 'done':
            moment, jump = self.moment(chance), wrong_by()
            trial.detail += f' jump by {-jump:.0f} s at {moment[1]} {moment[0]}'
            trial.starts.append(self.start(runs, cache, clock=wrong_by(), moment=moment, act='jump', jump=jump)[0])
        self.judged(trial, run, len(trial.starts) - 1)
        if run.complete:
            seconds = [*run.history.seconds, *run.history.fit_seconds.dropna(), run.json('timing')['total']]
            if not all(0 <= s < 600 for s in seconds): trial.faults.append(f'durations of {min(seconds):.0f} to {max(seconds):.0f} s')

    def two_runs(self, trial, chance, home, runs, cache, run):
        crew, killed = [], chance.random() < .4
        for n in range(chance.randint(2, 3)):
            crew.append(self.running(runs, cache))
            time.sleep(chance.choice([0, 0, chance.random()*self.seconds, chance.uniform(.9, 1.1)*self.seconds]))
        if killed:
            time.sleep(chance.random()*self.seconds)
            chance.choice(crew).signal(signal.SIGKILL)
        trial.detail, trial.starts = f"{len(crew)} at once{', one killed' if killed else ''}", [r.wait() for r in crew]
        for s in trial.starts:
            if s.end == 'refused' and 'another process is working' not in s.said('refused'): trial.faults.append(s.said('refused'))
        trial.faults += self.claims(run)
        if not killed and not any(s.end == 'done' for s in trial.starts): trial.faults.append('none of them finished')
        if not killed and sum(s.number('step') for s in trial.starts) > self.steps: trial.faults.append('it was computed twice')
        trial.starts.append(self.start(runs, cache)[0])
        self.judged(trial, run, sum(s.end == 'SIGKILL' for s in trial.starts))

    def read_only(self, trial, chance, home, runs, cache, run):
        place = home/'read only'
        trial.detail = 'mounted read-only' if self.mounts else 'no file in it may be opened for writing'
        with mounted(place, '--bind', '-o', 'ro', str(self.data)) if self.mounts else contextlib.nullcontext(self.data) as root:
            if self.mounts: subprocess.run(['mount', '-o', 'remount,bind,ro', str(place)], check=True)
            how = dict(root=root, **({} if self.mounts else dict(untouched=str(root))))
            if chance.random() < .5: shutil.rmtree(cache)
            if chance.random() < .5: self.stop(trial, chance, runs, cache, 'kill', **how)
            if not trial.starts or trial.starts[-1].end != 'done': trial.starts.append(self.start(runs, cache, **how)[0])
        self.judged(trial, run, len(trial.starts) - 1)

    def cache_deleted(self, trial, chance, home, runs, cache, run):
        if chance.random() < .5:
            after = chance.random()*self.seconds
            trial.detail = f'from outside, after {after:.2f} s'
            running = self.running(runs, cache)
            time.sleep(after)
            shutil.rmtree(cache, ignore_errors=True)
            trial.starts.append(running.wait())
        else:
            moment = self.moment(chance)
            trial.detail = f'at {moment[1]} {moment[0]}'
            trial.starts.append(self.start(runs, cache, moment=moment, act='wipe')[0])
        trial.faults += self.claims(run)
        if trial.starts[-1].end != 'done': trial.starts.append(self.start(runs, cache)[0])
        self.judged(trial, run, len(trial.starts) - 1)

KINDS = {'SIGKILL': 'sigkill', 'SIGTERM': 'sigterm', 'SIGINT': 'sigint', 'disk full': 'disk_full', 'file truncated': 'truncated', 'byte flipped': 'flipped', 'clock moved': 'clock',
         'runs on one folder': 'two_runs', 'read-only data': 'read_only', 'cache deleted': 'cache_deleted'}

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--trials', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', default=','.join(KINDS), help='comma separated')
    parser.add_argument('--keep', action='store_true', help='keep the folder; without, it stays only when there is a fault')
    a = parser.parse_args()
    kinds, folder, begun = [k for k in KINDS if k in a.kinds.split(',')], Path(tempfile.mkdtemp(prefix='cdfss-campaign-')), time.time()
    campaign = Campaign(folder)
    print(f'undisturbed: {campaign.steps} steps, {campaign.blocks} blocks, {campaign.totals["calls"]} calls, {campaign.totals["files"]} file operations, {campaign.seconds:.1f} s; '
          f'{"a tmpfs can be mounted" if campaign.mounts else "no tmpfs can be mounted: limits on file size stand for a full disk"}', flush=True)
    ends, faulty = collections.defaultdict(collections.Counter), []
    for n in range(a.trials):
        kind = kinds[n % len(kinds)]
        trial = campaign.try_out(kind, a.seed*1_000_000 + n)
        ends[kind]['faulty' if trial.faults else 'as undisturbed at once' if len(trial.starts) == 1 else 'as undisturbed in the end'] += 1
        for s in trial.starts: ends[kind][s.end] += 1
        if trial.faults:
            faulty.append(trial)
            print(f'FAULT {kind} {trial.seed} ({trial.detail.strip()}) {trial.outcome}: ' + '; '.join(trial.faults)[:600], f'[{campaign.folder/str(campaign.number)}]', flush=True)
        if (n + 1) % 25 == 0: print(f'{n + 1} trials, {len(faulty)} faulty, {time.time() - begun:.0f} s', flush=True)
    table = pd.DataFrame({k: {'trials': sum(c[w] for w in ('faulty', 'as undisturbed at once', 'as undisturbed in the end')), **c} for k, c in ends.items()}).T.fillna(0).astype(int)
    print(table.to_string())
    print(f'{a.trials} trials, {len(faulty)} faulty, seed {a.seed}, {time.time() - begun:.0f} s')
    if not faulty and not a.keep: shutil.rmtree(folder)
    sys.exit(bool(faulty))

if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
