"""Seconds for one of a user's own images after fitting, and where they go.

    python benchmarks/segment.py                       the miniature's backbone and ResNet-50 (random weights), 400 px, 1 and 5 supports
    python benchmarks/segment.py --threads 1 --repeat 20

Prints the median over repeats of wall-clock and of processor time, the load of the machine before (other work on it makes wall-clock times meaningless), and the targets.
"""
import argparse, os, statistics, time
import numpy as np
import torch
import cdfss

TARGETS = {'miniature': .2, 'resnet50': .6}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--recipe', default='ssp+lcm'); p.add_argument('--size', type=int, default=400); p.add_argument('--shots', type=int, nargs='+', default=[1, 5])
    p.add_argument('--repeat', type=int, default=10); p.add_argument('--threads', type=int, default=0); p.add_argument('--precision', nargs='+', default=['float32', 'bf16'])
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (6, 400, 400, 3), dtype=np.uint8), [np.hypot(*np.mgrid[-200:200, -200:200]) < r for r in range(60, 120, 10)]
    print(f"{a.recipe}, pictures of 400x400, working size {a.size}, {torch.get_num_threads()} threads, torch {torch.__version__}, load before {os.getloadavg()[0]:.2f}")
    print(f"{'backbone':>10} {'precision':>10} {'shots':>5} {'fit s':>7} {'predict s':>10} {'processor s':>12} {'target s':>9}")
    for backbone, target in TARGETS.items():
        for precision in a.precision:
            for k in a.shots:
                seg = cdfss.load(a.recipe, backbone=backbone, weights=None if backbone == 'miniature' else 'none', size=a.size, device='cpu', precision=precision)
                start = time.perf_counter()
                seg.fit(list(images[:k]), [m.astype(int) for m in masks[:k]])
                fit, wall, cpu = time.perf_counter() - start, [], []
                seg.predict(images[5])
                for _ in range(a.repeat):
                    w, c = time.perf_counter(), time.process_time()
                    seg.predict(images[5])
                    wall.append(time.perf_counter() - w); cpu.append(time.process_time() - c)
                print(f"{backbone:>10} {precision:>10} {k:>5} {fit:7.3f} {statistics.median(wall):10.3f} {statistics.median(cpu):12.3f} {target:9.1f}", flush=True)

if __name__ == '__main__': main()
