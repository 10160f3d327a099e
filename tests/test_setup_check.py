"What the check of the set-up reads out of README and out of what is printed."
import setup_check as S

def test_readme_has_what_is_checked(repo):
    readme = (repo/'README.md').read_text()
    assert S.commands(readme) == ['make train METHOD=lcm', 'make test']
    found = S.shown(readme)
    assert set(found) == {'ssp+lcm', 'ssp'} and all(len(cells) == 4 for cells in found.values())

PRINTED = """    epoch     loss  source     fss deepglobe    isic   chest    time    left
      0/6        -    28.3    41.5      53.4    45.8    47.4    9.9s       -
      1/6   1.0651    33.0    45.2      57.2    44.1    52.5     99s   9m16s
method          fss 1-shot   deepglobe 1-shot        fss 5-shot
---------
ssp+lcm  45.0 [42.8, 47.1]  52.3 [49.9, 54.6]  1.0 [0.9, 1.1]
"""
README = "```\nmake train   # x\nmake test\n```\n```\n      1/6   1.0651    33.0    45.2      57.2    44.1    52.5     15s   1m16s\nmethod          fss 1-shot   deepglobe 1-shot ...\nssp+lcm  45.0 [42.8, 47.1]  52.3 [49.9, 54.6] ...\n```\n## Methods\n"

def test_what_is_printed_is_compared():
    assert S.commands(README) == ['make train', 'make test'] and S.train_faults(PRINTED, README) == []
    assert S.train_faults(PRINTED.replace('49.9', '49.8'), README) and S.train_faults(PRINTED.replace('1.0651', '1.0650'), README)
    assert S.train_faults('', README) and S.train_faults(PRINTED.replace('ssp+lcm', 'ssp'), README)

def test_summaries():
    good = "Success.\n....\n\x1b[32m1202 passed\x1b[0m, 6 skipped, 3 warnings in 300.01s (0:05:00)\n"
    assert S.test_faults(good) == [] and S.test_faults(good.replace('Success.', '')) and S.test_faults('Success.\n')
    assert S.test_faults(good.replace('1202 passed', '2 failed, 1200 passed')) and S.test_faults('Success.\n1 failed in 2.00s\n') and S.test_faults('Success.\n3 passed, 1 error in 2.0s')
