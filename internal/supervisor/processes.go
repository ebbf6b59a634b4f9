//go:build linux

package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// processes are those of one generation: those in its cgroup, or else those of its session, their descendants, and those
// which still carry its mark in their environment.
type processes struct {
	pid        int    // the first
	cgroup     string // its folder; empty: it has none
	generation int
	keeper     int
}

// makeCgroup makes a folder for a generation below this process' own cgroup.
func makeCgroup(service string, keeper, generation int) (string, error) {
	parent, err := serviceCgroup(service, keeper)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(parent, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	path := filepath.Join(parent, strconv.Itoa(generation))
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		_ = os.Remove(parent)
		return "", err
	}
	return path, nil
}

func serviceCgroup(service string, keeper int) (string, error) {
	own, err := sys.OwnCgroup2()
	if err != nil {
		return "", err
	}
	return filepath.Join(own, fmt.Sprintf("berth-%s-%d", service, keeper)), nil
}

// removeCgroup removes a generation's folder. The kernel keeps it busy until the last process has been reaped.
func removeCgroup(path string) error {
	if path == "" {
		return nil
	}
	var err error
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = os.Remove(path); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	return err
}

// List is the generation's processes now.
func (p processes) List() ([]int, error) {
	if p.cgroup != "" {
		data, err := os.ReadFile(filepath.Join(p.cgroup, "cgroup.procs"))
		if err != nil {
			return nil, err
		}
		var pids []int
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && pid != 0 {
				pids = append(pids, pid)
			}
		}
		return pids, nil
	}
	return p.search()
}

func (p processes) search() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return nil, err
	}
	mark := []byte(fmt.Sprintf("\x00BERTH_KEEPER=%d\x00", p.keeper))
	generation := []byte(fmt.Sprintf("\x00BERTH_GENERATION=%d\x00", p.generation))
	parents := map[int]int{}
	member := map[int]bool{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		parent, session, state, err := stat(pid)
		if err != nil || state == 'Z' || state == 'X' {
			continue
		}
		parents[pid] = parent
		if pid == p.pid && parent == p.keeper {
			member[pid] = true
		} else if env, err := os.ReadFile("/proc/" + name + "/environ"); err == nil {
			env = append([]byte{0}, env...)
			member[pid] = bytes.Contains(env, mark) && bytes.Contains(env, generation) || session == p.pid && p.pid != 0 && alive(p.pid, p.keeper)
		}
	}
	var pids []int
	for pid := range parents {
		for at, depth := pid, 0; at > 1 && depth < 64; at, depth = parents[at], depth+1 {
			if member[at] {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids, nil
}

// alive reports whether the first process is still there: its number, and with it its session's, may be another's by now.
func alive(pid, keeper int) bool {
	parent, _, _, err := stat(pid)
	return err == nil && parent == keeper
}

// stat reads a process' parent, session and state from /proc/PID/stat (proc(5)).
func stat(pid int) (parent, session int, state byte, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, 0, err
	}
	// The command may hold spaces and parentheses; what follows the last ")" does not.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 4 {
		return 0, 0, 0, fmt.Errorf("/proc/%d/stat is cut short", pid)
	}
	parent, _ = strconv.Atoi(fields[1])
	session, _ = strconv.Atoi(fields[3])
	return parent, session, fields[0][0], nil
}

// Signal signals every process.
func (p processes) Signal(sig syscall.Signal) error {
	if sig == syscall.SIGKILL && p.cgroup != "" {
		// All at once, so that none can fork away (Linux 5.14).
		if err := os.WriteFile(filepath.Join(p.cgroup, "cgroup.kill"), []byte("1"), 0); err == nil {
			return nil
		}
	}
	pids, err := p.List()
	if err != nil {
		return err
	}
	if sig == syscall.SIGKILL && p.cgroup == "" {
		// Stopped first, a process can't fork one that the list misses.
		for _, pid := range pids {
			_ = sys.Kill(pid, syscall.SIGSTOP)
		}
		if again, err := p.List(); err == nil {
			pids = again
		}
	}
	var errs []error
	for _, pid := range pids {
		errs = append(errs, sys.Kill(pid, sig))
	}
	return errors.Join(errs...)
}
