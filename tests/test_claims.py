"The verdicts on the papers' claims, from a made-up study in which every effect is known, and the words of a diagnosis."
import math
import pandas as pd, pytest
from cdfss.diagnostics import diagnosis
from cdfss.report.claims import CLAIMS, Claim, check, gain, save, to_text, verdict
from studies import STAGES, made_up

@pytest.fixture(scope='module')
def study(tmp_path_factory): return made_up(tmp_path_factory.mktemp('runs'), seeds=(0, 1, 2))

@pytest.fixture(scope='module')
def table(study): return check(study).set_index('claim')

def said(table, words):
    [row] = [r for c, r in table.iterrows() if c.startswith(words)]
    return row

@pytest.mark.parametrize('low,high,bound,expected', [(.1, 1, 0, 'holds'), (-1, -.1, 0, 'does not hold'), (-1, 1, 0, 'cannot tell'), (0, 1, 0, 'cannot tell'),
                                                     (1, 2, 3, 'does not hold'), (math.nan, math.nan, 0, 'cannot tell')])
def test_verdict(low, high, bound, expected): assert verdict(low, high, bound) == expected

@pytest.mark.parametrize('words,value,expected', [
    ('on far targets the base peaks', 4, 'holds'), ('LEM lessens the fall', 4, 'holds'), ('a disturbance of the shallowest', 1.2, 'holds'),
    ('freezing the first two', 8/3, 'holds'), ('LCM gains (', 3, 'holds'), ('both gain more than LCM', 11/3, 'holds'), ('LEM makes source', .05, 'holds'),
    ('removing frequencies of the images helps', 2, 'holds'), ('removing frequencies of the images harms', 3, 'holds'), ('mIoU rises where channel correlation falls, under the best', 0, 'cannot tell'), ('mIoU rises where channel correlation falls, under APM', 0, 'cannot tell'),
    ('APM-M and ACPA lower', .1, 'holds'), ('APM-M and ACPA gain', 5, 'holds'),
    ('prototype predictions', 4, 'holds'), ('affinity predictions', 6, 'holds'), ('LCM gains more than LEM', -2/3, 'does not hold')])
def test_known_effects(table, words, value, expected):
    row = said(table, words)
    assert row['value'] == pytest.approx(value, abs=.8) and row['verdict'] == expected and row['low'] <= row['value'] <= row['high']

def test_what_was_not_measured_is_said(study):
    row = check(study, [Claim('us', 'HSM gains', 'here', 'points', gain('ssp+hsm', 'ssp'))]).iloc[0]
    assert row['verdict'] == 'cannot tell' and math.isnan(row['value']) and row['data'] == 'not measured: the study has no run of ssp+hsm'

def test_one_seed_cannot_tell(tmp_path):
    one = check(made_up(tmp_path, seeds=(0,)), [Claim('us', 'LCM gains', 'here', 'points', gain('ssp+lcm', 'ssp'))]).iloc[0]
    assert one['value'] == pytest.approx(3, abs=1) and one['verdict'] == 'cannot tell' and 'one seed' in one['data']

def test_table_and_text(study, table, tmp_path):
    assert len(table) == len(CLAIMS) and (table['source'].str.contains('.md') == (table['paper'] != 'here')).all() and table['data'].str.contains('miniature|not measured').all()
    text = to_text(table.reset_index())
    assert text.count('\n') >= 2*len(CLAIMS) and text.split('\n')[-1].endswith('cannot tell') and max(map(len, text.split('\n'))) <= 135
    again = check(study).set_index('claim')
    assert save(again, study, tmp_path/'a').read_bytes() == save(table, study, tmp_path/'b').read_bytes()

# ---- the words of a diagnosis -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def found(study):
    run = study.runs[0]
    return {d: diagnosis.kept(run, d, 'ssp') for d in ('sharpness', 'frequency', 'errors')}

def test_reading_names_stage_and_recipe(found):
    reading = diagnosis.read('ssp', STAGES, 'voc', True, found)
    assert 'most after stem' in reading.text and reading.recipe.startswith('ssp+lem')
    assert diagnosis.read('ssp+lem', STAGES, 'voc', True, {'sharpness': found['sharpness']}).recipe is None
    assert diagnosis.read('ssp', STAGES, 'voc', False, {'sharpness': found['sharpness']}).recipe is None

def test_reading_turns_with_the_numbers(found):
    f = found['sharpness']['sharpness']
    other = {'sharpness': f.assign(stage=f['stage'].map(dict(zip(STAGES, STAGES[::-1]))))}
    assert 'most after stage3' in diagnosis.read('ssp', STAGES, 'voc', True, {'sharpness': other}).text
    wide = {'sharpness': f.assign(drop_low=f['drop'] - 40, drop_high=f['drop'] + 40)}
    assert 'perhaps the most fragile' in diagnosis.read('ssp', STAGES, 'voc', True, {'sharpness': wide}).text

def test_first_of_counts_how_sure():
    table = lambda e: pd.DataFrame(dict(value=[2., 1.], error=[e, e]), index=['a', 'b'])
    assert diagnosis.first_of(table(.01)) == ('a', 1.) and .5 < diagnosis.first_of(table(1.))[1] < .9

def test_kept_answers_only_the_same_question(study):
    run = study.runs[0]
    assert diagnosis.kept(run, 'errors', 'ssp') and diagnosis.kept(run, 'errors', 'ssp', {}) and diagnosis.kept(run, 'errors', 'ssp', {'seed': 1}) is None
    assert diagnosis.kept(run, 'granularity', 'ssp') is None

def test_calibration_speaks_of_lcms_own_rule():
    "The tables also say by which rule the episodes were drawn; that is not LCM's."
    sweep = pd.DataFrame([dict(target=t, k=k, w=.6, beta_rule=r, beta=b, patch=1, gain=g, rule='patnet, 120 of 600') for t in ('isic', 'chest') for k, r, b, g in ((3, 'fixed', .7, 1.), (8, 'fixed', .8, 4.), (8, 'mean', math.nan, 2.))])
    chosen = pd.DataFrame([dict(target=t, choice='chosen on the other half', gain=4., gain_low=3., gain_high=5.) for t in ('isic', 'chest')])
    f = diagnosis.calibration_finding(dict(calibration=sweep, chosen=chosen), 'voc', 'ssp')
    assert f.options == dict(lcm_k=8, lcm_w=.6, lcm_beta_rule='fixed', lcm_beta=.8, lcm_patch=1) and f.modules == ('lcm',) and 'beta_rule fixed' in f.text and 'patnet' not in f.text
    adaptive = diagnosis.calibration_finding(dict(calibration=sweep.assign(gain=[0., 0., 5.]*2), chosen=chosen), 'voc', 'ssp')
    assert adaptive.options['lcm_beta_rule'] == 'mean' and adaptive.options['lcm_beta'] == .7
