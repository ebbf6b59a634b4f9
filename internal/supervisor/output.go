//go:build linux

package supervisor

import (
	"bytes"
	"io"
	"os"
	"slices"
	"sync"
)

// tail copies a generation's output through, byte for byte, and keeps its last lines.
type tail struct {
	done sync.WaitGroup

	mu    sync.Mutex // guards lines and part, not the copying
	lines []string
	part  []byte
}

// What is kept of a generation's output.
const (
	keptLines = 20
	keptBytes = 400 // of a line
)

// copy goes on until no process has the output open any more. An error of ours ends nothing: the program must not
// block because nobody reads its log.
func (t *tail) copy(to io.Writer, from *os.File) {
	t.done.Go(func() {
		defer from.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				_, _ = to.Write(buf[:n])
				t.keep(buf[:n])
			}
			if err != nil {
				return
			}
		}
	})
}

func (t *tail) keep(data []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// Only the last lines of a large chunk can matter.
	if over := len(data) - keptLines*keptBytes; over > 0 {
		data = data[over:]
	}
	for {
		line, rest, found := bytes.Cut(data, []byte("\n"))
		if room := keptBytes - len(t.part); room > 0 {
			t.part = append(t.part, line[:min(room, len(line))]...)
		}
		if !found {
			return
		}
		if len(t.lines) == keptLines {
			t.lines = slices.Delete(t.lines, 0, 1)
		}
		t.lines = append(t.lines, string(bytes.TrimRight(t.part, "\r")))
		t.part, data = t.part[:0], rest
	}
}

// last is the last lines of the output.
func (t *tail) last() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := slices.Clone(t.lines)
	if len(t.part) > 0 {
		lines = append(lines, string(t.part))
	}
	return lines
}
