# The two commands that matter: `make demo` runs the whole chain on the embedded data, `make test` the tests. Python 3.10 to 3.13.
PYTHON ?= python3
PY     := .venv/bin/python
CFG    ?= configs/shapes.yaml
ARGS   ?=

.PHONY: demo test bench clean

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

.venv/dev: .venv/demo requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@

# The tutorial: these lines, in this order, are the method.
demo: .venv/demo
	$(PY) train_diffusion.py  $(CFG) $(ARGS)
	$(PY) probe.py            $(CFG) $(ARGS)
	$(PY) extract_features.py $(CFG) $(ARGS)
	$(PY) self_label.py       $(CFG) $(ARGS) method=kmeans
	$(PY) self_label.py       $(CFG) $(ARGS) method=random reference=kmeans
	$(PY) self_label.py       $(CFG) $(ARGS) method=classes
	for labels in none kmeans random classes; do \
	    $(PY) train_guided.py $(CFG) $(ARGS) labels=$$labels || exit $$?; done
	for name in unconditional kmeans random classes; do \
	    $(PY) sample_ode.py   $(CFG) $(ARGS) checkpoint=guided/$$name name=$$name || exit $$?; done
	$(PY) train_diffusion.py  $(CFG) $(ARGS) name=early images=4k
	$(PY) sample_ode.py       $(CFG) $(ARGS) checkpoint=guided/unconditional autoguide=diffusion/early name=early
	$(PY) sample_ode.py       $(CFG) $(ARGS) --table

test: .venv/dev
	$(PY) -m pytest -q -n 2 --dist loadfile tests

bench: .venv/dev
	$(PY) tests/bench.py

clean:
	rm -rf .venv
