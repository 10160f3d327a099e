"""How much of the real study is the luck of rounding: the same plan, seeds, pictures and episodes, trained by two versions of the code whose arithmetic differs in the last bits.

    python benchmarks/real_again.py runs/real-before runs/real          writes figures/real/again.csv

A row per method, target ('far' and 'all': means) and shot of the main backbone that both have in at least three seeds: the change of class mIoU against its base with the 95 % interval over seeds, before
and now, their verdicts (gains, loses, cannot tell), and the largest difference of a single seed's class mIoU."""
import sys
from pathlib import Path
import pandas as pd
from cdfss.basics import atomic_write
from cdfss.report.claims import verdict
from cdfss.report.real import GROUPS, RealOptions, episodes_of, finished, lists, per_seed, score_table

WORDS = {'holds': 'gains', 'does not hold': 'loses', 'cannot tell': 'cannot tell'}
KEYS = ['backbone', 'method', 'target', 'shot']

def read(folder:str) -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = finished(RealOptions(runs=folder))
    frame = episodes_of({n: r for n, r in runs.items() if 'MobileNet' not in n})
    most = lists(frame)[0]
    table = score_table(frame, most)
    return table[(table.base != '') & (table.seeds >= 3)], per_seed(frame, upto=most)

def main(before:str, now:str, out:str='figures/real/again.csv'):
    (a, sa), (b, sb) = read(before), read(now)
    both = a.merge(b, on=KEYS, suffixes=('_before', ''))
    for end in ('_before', ''): both[f'verdict{end}'] = [WORDS[verdict(l, h)] for l, h in zip(both[f'change_low{end}'], both[f'change_high{end}'])]
    keys = ['label', 'target', 'shot', 'seed']
    seeds = sa.merge(sb, on=keys, suffixes=('_before', ''))
    seeds = seeds.assign(moved=(seeds.value - seeds.value_before).abs()).rename(columns=dict(label='method')).groupby(['method', 'target', 'shot']).moved.max().round(3)
    both['moved'] = [seeds.get((r.method, r.target, r.shot)) for r in both.itertuples()]
    both['same'] = (both.verdict == both.verdict_before).map({True: 'yes', False: 'no'})
    columns = [*KEYS, *(f'{c}{end}' for end in ('_before', '') for c in ('change', 'change_low', 'change_high', 'verdict')), 'same', 'moved']
    atomic_write(Path(out), both[columns].to_csv(index=False, lineterminator='\n'))
    single = both[~both.target.isin(GROUPS)]
    print(f"{len(both)} changes, {(both.same == 'no').sum()} with another verdict: {pd.crosstab(both.verdict_before, both.verdict).to_string()}")
    print(f"a single seed's class mIoU on a target moved by {single.moved.median():.2f} points (median), at most {single.moved.max():.2f}")
    print(both[both.same == 'no'][['method', 'target', 'shot', 'change_before', 'verdict_before', 'change', 'verdict']].to_string(index=False))

if __name__ == '__main__': main(*sys.argv[1:])
