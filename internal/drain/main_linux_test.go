package drain

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestMain runs the test binary as a server program where a test asks for it, and fails on descriptors that tests leave behind;
// BPF objects are among them.
func TestMain(m *testing.M) {
	if mode := os.Getenv("BERTH_DRAIN_SERVER"); mode != "" {
		serve(mode)
		return
	}
	warm, err := net.Listen("tcp", "127.0.0.1:0") // the runtime's own descriptors
	if err != nil {
		panic(err)
	}
	warm.Close()
	before := left()
	code := m.Run()
	if after := left(); code == 0 && !slices.Equal(before, after) {
		fmt.Printf("left behind:\nbefore %s\nafter  %s\n", strings.Join(before, " "), strings.Join(after, " "))
		code = 1
	}
	os.Exit(code)
}

// left lists the descriptors but for the one that lists them.
func left() []string {
	var all []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			all = append(all, e.Name()+"→"+target)
		}
	}
	return all
}
