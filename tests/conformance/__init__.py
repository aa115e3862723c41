"""transformers' own common model tests, run against our classes and against its DeepseekV3, side by side.

    make conformance

transformers' sdist on PyPI carries the test classes every model of its own must pass (`ModelTesterMixin` and others
beside it); its wheel and this repository do not. So:

    fetch.py      downloads the sdist of the installed version and unpacks its tests/ into build/ (git-ignored)
    upstream.py   a package whose modules are those files, with stand-ins for what the sdist leaves out
    ranks.py      the stand-in that starts the processes of distributed tests
    suite.py      one tester with tiny sizes, and the two test classes it feeds: ours and DeepseekV3's
    report.py     runs the suite, compares, prints, and ends with 1 unless ours passes all that DeepseekV3 passes

`make test` runs none of it but test_report.py: it needs no network and no transformers but the installed one.

Not in the sdist, so not run here: the generation tests (tests/generation), export tests (tests/exporters) and pipeline
tests, which also need tiny models from the Hub. tests/test_cache.py, test_modeling.py and parity/ cover ours.
"""
