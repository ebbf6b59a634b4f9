# berth: `make demo` shows what it does, `make test` checks that it does.

GO      ?= go
PREFIX  ?= /usr/local
DESTDIR ?=

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
PLATFORMS   = darwin/amd64 darwin/arm64 freebsd/amd64 freebsd/arm64 windows/amd64 windows/arm64 linux/arm64
FUZZTIME   ?= 5s

.PHONY: build demo test lint cross fuzz soak bench install packages clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/berth ./cmd/berth

demo: build
	bin/berth demo

test: packages lint cross
	$(GO) test -race -timeout 9m ./...
	$(MAKE) fuzz

# What the tests need beyond Go, on Debian as root; elsewhere the tests say what they skip.
packages:
	@scripts/packages

lint:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt'd:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	@! git grep -ln '"golang.org/x/sys/unix"' -- '*.go' ':!internal/sys' || { echo "only internal/sys imports golang.org/x/sys/unix"; exit 1; }

cross:
	@for p in $(PLATFORMS); do \
		echo "build and vet $$p"; \
		GOOS=$${p%/*} GOARCH=$${p#*/} CGO_ENABLED=0 $(GO) build ./... && \
		GOOS=$${p%/*} GOARCH=$${p#*/} CGO_ENABLED=0 $(GO) vet ./... || exit 1; \
	done

# Each parser for FUZZTIME; `make fuzz FUZZTIME=10m` for longer.
fuzz:
	@scripts/fuzz $(FUZZTIME)

# Every program, 50 restarts a load, as root and as an ordinary user.
soak:
	BERTH_RESTARTS=50 BERTH_SOAK=1 $(GO) test -count=1 -timeout 170m -v -run 'TestPrograms|TestKill|TestCandidate' ./cmd/berth

bench:
	$(GO) test -run '^$$' -bench . -benchtime 1s ./...

install: build
	install -D -m 0755 bin/berth $(DESTDIR)$(PREFIX)/bin/berth
	bin/berth man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	bin/berth completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/berth
	bin/berth completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_berth
	bin/berth completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/berth.fish

clean:
	rm -rf bin
