"""The log of a run: what a kill leaves of it is read, and goes on."""

from raydr.train.metrics import METRICS, append, drop_after, read_metrics


def test_a_line_that_was_cut_off_is_no_record_and_does_not_stay(tmp_path):
    file = tmp_path / METRICS
    for step in (1, 2, 3):
        append(file, step, {"loss": 1 / step})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 4.0, "lo')
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
    drop_after(file, 3)
    assert file.read_bytes() == whole
    append(file, 4, {"loss": 0.2})
    assert read_metrics(file)[-1] == {"step": 4, "loss": 0.2}
    drop_after(file, 0)
    assert read_metrics(file) == []


def test_there_may_be_none_yet(tmp_path):
    drop_after(tmp_path / METRICS, 0)
    assert read_metrics(tmp_path / METRICS) == []
