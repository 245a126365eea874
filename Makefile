.PHONY: help check format test
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
check: ## lint everything, change nothing
	ruff check . && ruff format --check . && shellcheck .ci/run $$(git ls-files '*.sh')
format: ## format and fix what can be fixed
	ruff format . && ruff check --fix .
test: ## set up and test, as scripts/test.sh
	bash scripts/test.sh
