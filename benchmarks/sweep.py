"""What the scheduler of a sweep costs: the same runs by `cdfss.report.sweeps.sweep` and in plain loops, side by side in one run.

The plain way is as many processes as the sweep has workers, each a loop of `train` over its part of the list, with nothing between: no queue, no record, no
table, no news. Both sides import once a worker and round, and start with empty run folders. They are run in small rounds in turn, so that whatever else the machine does falls on both,
and the overhead of each round is a measurement of its own, of which mean and 95 % t-interval are printed. Wall-clock time is that of the user; the processor's time of all processes, driver and
workers, is not stretched by other work. What the imports take (measured too, with workers that have nothing to do) is not counted among the runs that the overhead is compared with: 100 runs
in one sweep import no more often than ten.

    python benchmarks/sweep.py                          100 runs of the miniature, each of about a second
    python benchmarks/sweep.py --runs 40 --rounds 4 --workers 1
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
from cdfss.engine.grid import shares
from cdfss.engine.metrics import seed_interval
from cdfss.report.sweeps import SweepOptions, planned, sweep

PLAIN = '''
import json, sys
from cdfss.engine.train import TrainSettings, train
for s in json.loads(sys.argv[1]): train(TrainSettings.make(s), say=lambda line: None)
'''

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=100); p.add_argument('--workers', type=int, default=2); p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--epochs', type=int, default=0); p.add_argument('--fit-episodes', type=int, default=32)
    return p.parse_args()

def timed(f) -> tuple[float, float]:
    "Seconds by the clock, and of processors: this process's and its children's."
    used = lambda: sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    clock, cpu = time.perf_counter(), used()
    f()
    return time.perf_counter() - clock, used() - cpu

def plain(grid, workers):
    each = shares(len(grid) or workers, workers)
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
        sides = dict(imports=lambda k: plain([], a.workers), plain=lambda k: plain(grids[k], a.workers), sweep=lambda k: swept(parts[k]))
        rounds = []
        for k in range(a.rounds):
            took = {name: timed(lambda: sides[name](k)) for name in (list(sides) if k % 2 == 0 else list(sides)[::-1])}
            rounds.append(took)
            print(f'round {k + 1}  {len(parts[k])} runs  ' + '  '.join(f'{n} {took[n][0]:6.1f} s, processor {took[n][1]:6.1f} s' for n in sides) + f'  load {os.getloadavg()[0]:.1f}', flush=True)
        runs = {n: {p.name for p in Path(d, folder).iterdir() if (p/'metrics.json').exists()} for n, folder in (('plain', 'plain'), ('sweep', 'swept'))}
        assert runs['plain'] == runs['sweep'] and len(runs['sweep']) == a.runs, 'not the same runs'
        assert all(Path(d, 'plain', r, 'metrics.json').read_bytes() == Path(d, 'swept', r, 'metrics.json').read_bytes() for r in runs['sweep']), 'not the same numbers'
        print(f'{a.runs} runs, {a.workers} worker{"s" if a.workers > 1 else ""}, the same numbers on both sides')
        for which, name in enumerate(('by the clock', 'of processor time')):
            more = [r['sweep'][which] - r['plain'][which] for r in rounds]
            share = [100*m/(r['plain'][which] - r['imports'][which]) for m, r in zip(more, rounds)]
            mean, low, high = seed_interval(share)
            print(f"overhead {name}: {mean:+.1f} % (95 % interval {low:+.1f} to {high:+.1f}, {a.rounds} rounds), {1e3*sum(more)/a.runs:+.0f} ms a run of {1e3*sum(r['plain'][which] - r['imports'][which] for r in rounds)/a.runs:.0f} ms")

if __name__ == '__main__': main()
