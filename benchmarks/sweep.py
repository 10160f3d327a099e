"""What the scheduler of a sweep costs: the same runs by `cdfss.report.sweeps.sweep` and in plain loops, side by side in one run.

The plain way is as many processes as the sweep has workers, each a loop of `train` over its part of the list, with nothing between: no queue, no record, no
table, no news. Both sides import once a worker and start with empty run folders. They are run in small batches in turn, so that whatever else the machine
does falls on both. Wall-clock time is that of the user; the processor's time of all processes, driver and workers, is not stretched by other work.

    python benchmarks/sweep.py                          100 runs of the miniature, each of about a second
    python benchmarks/sweep.py --runs 20 --workers 1 --epochs 1
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
from cdfss.engine.grid import shares
from cdfss.report.sweeps import SweepOptions, planned, sweep

PLAIN = '''
import json, sys
from cdfss.engine.train import TrainSettings, train
for s in json.loads(sys.argv[1]): train(TrainSettings.make(s), say=lambda line: None)
'''

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=100); p.add_argument('--workers', type=int, default=2); p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--epochs', type=int, default=0); p.add_argument('--fit-episodes', type=int, default=32)
    return p.parse_args()

def timed(f) -> tuple[float, float]:
    "Seconds by the clock, and of processors: this process's and its children's."
    used = lambda: sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    clock, cpu = time.perf_counter(), used()
    f()
    return time.perf_counter() - clock, used() - cpu

def plain(grid, workers):
    each = shares(len(grid), workers)
    loops = [subprocess.Popen([sys.executable, '-c', PLAIN, json.dumps(grid[k::len(each)])], env={**os.environ, **e}) for k, e in enumerate(each)]
    if any(p.wait() for p in loops): raise SystemExit('a plain loop failed')

def main():
    a = arguments()
    with tempfile.TemporaryDirectory() as d:
        options = lambda part, runs: SweepOptions(methods='prototype', seeds=f'{part[0]}-{part[-1]}', targets='isic', runs=runs, workers=a.workers, settings=(
            f'epochs={a.epochs}; fit_episodes={a.fit_episodes}; test_episodes=40; track_episodes=20; samples=0; shots=1; device=cpu'))
        def swept(part):
            done = sweep(options(part, f'{d}/swept'), say=lambda line: None)
            done.check()
        parts = [list(range(k*a.runs//a.rounds, (k + 1)*a.runs//a.rounds)) for k in range(a.rounds)]
        grids = [planned(options(p, f'{d}/plain')) for p in parts]
        plain([{**grids[0][0], 'runs': f'{d}/warm'}], 1)                                     # the data are drawn and decoded
        sides = dict(plain=lambda k: plain(grids[k], a.workers), sweep=lambda k: swept(parts[k]))
        total = {n: [0., 0.] for n in sides}
        for k in range(a.rounds):
            for name in (list(sides) if k % 2 == 0 else list(sides)[::-1]):
                wall, cpu = timed(lambda: sides[name](k))
                total[name][0] += wall
                total[name][1] += cpu
                print(f'round {k + 1}  {name:5}  {len(parts[k])} runs  {wall:7.1f} s  processor {cpu:7.1f} s', flush=True)
        runs = {n: {p.name for p in Path(d, folder).iterdir() if (p/'metrics.json').exists()} for n, folder in (('plain', 'plain'), ('sweep', 'swept'))}
        assert runs['plain'] == runs['sweep'] and len(runs['sweep']) == a.runs, 'not the same runs'
        assert all(Path(d, 'plain', r, 'metrics.json').read_bytes() == Path(d, 'swept', r, 'metrics.json').read_bytes() for r in runs['sweep']), 'not the same numbers'
        (pw, pc), (sw, sc) = total['plain'], total['sweep']
        print(f"{a.runs} runs, {a.workers} workers: sweep/plain {sw/pw:.3f} by the clock ({(sw - pw)/a.runs*1e3:+.0f} ms a run), {sc/pc:.3f} of processor time ({(sc - pc)/a.runs*1e3:+.0f} ms a run); the same numbers on both sides")

if __name__ == '__main__': main()
