"""The stand-in for measured spectra: a transmitter in a room whose walls reflect."""

import chex
import numpy as np
import pytest

import zoo
from trainers.data.spectra import load_spectra, room_spectra

SIZES = {"height": 18, "width": 36}
RECEIVER = np.array([0.4, 0.3, -0.5])


def test_the_direct_way_is_the_brightest_and_walls_add_lobes():
    offset = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    spectra = room_spectra(RECEIVER + offset, height=36, width=72)
    np.testing.assert_allclose(spectra.max(axis=(1, 2)), 1)
    peaks = [np.unravel_index(s.argmax(), s.shape) for s in spectra]
    # Ahead (azimuth 0), at the right (90 degrees), and straight down (elevation 90).
    assert peaks[0][0] in (17, 18)
    assert peaks[0][1] in (35, 36)
    assert peaks[1][1] in (53, 54)
    assert peaks[2][0] == 35
    # The mirror image behind the wall at -z is seen backwards.
    assert spectra[0, 18, 0] > 0.1


def test_the_standin_is_the_same_everywhere_and_its_parts_are_distinct():
    data = load_spectra("standin", data_dir=None, **SIZES)
    chex.assert_trees_all_equal(data.train, load_spectra("standin", data_dir=None, **SIZES).train)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [200, 40, 60]
    batch = data.test.batch(np.array([3, 1]))
    chex.assert_shape(
        [batch[k] for k in ("tx", "y", "mean", "rotation")], [(2, 3), (2, 18, 36), (2, 18, 36), (2, 3, 3)]
    )
    assert float(batch["y"].min()) >= 0
    np.testing.assert_allclose(batch["mean"][1], np.asarray(data.train.spectrum).mean(axis=0), rtol=1e-5)
    places = [{tuple(p) for p in np.asarray(part.tx).tolist()} for part in (data.train, data.valid, data.test)]
    assert len(set.union(*places)) == 300
    assert not np.allclose(data.train.tx, load_spectra("standin", data_dir=None, seed=1, **SIZES).train.tx)


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("rfid", None, "no set of spectra is called 'rfid'"),
        ("standin", "somewhere", "the stand-in is generated and takes no --data-dir"),
    ],
)
def test_what_cannot_be_loaded(name, data_dir, message):
    with pytest.raises(zoo.UserError, match=message):
        load_spectra(name, data_dir=data_dir, **SIZES)
