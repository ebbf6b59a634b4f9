//go:build linux

package keeper

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/intercept"
	"github.com/berth-net/berth/internal/sys"
)

// The steps of a shim that can fail.
const (
	stepFilter = "intercept the program's calls"
	stepDir    = "chdir"
	stepExec   = "exec"
	stepShim   = "prepare the program"
)

// shim is the life of a process between its start and the execution of the program. It does not return.
func shim() {
	// The filter is put on a thread, and the thread that executes takes it along.
	runtime.LockOSThread()
	sock := os.NewFile(3, "keeper")
	fail := func(step string, err error) {
		report, _ := json.Marshal(shimReport{Step: step, Errno: sys.Errno(err), Text: err.Error()})
		_ = sys.SendMessage(sock, report)
		os.Exit(127)
	}
	buf := make([]byte, maxMessage)
	n, _, err := sys.ReceiveMessage(sock, buf)
	var spec shimSpec
	if err == nil {
		err = json.Unmarshal(buf[:n], &spec)
	}
	if err == nil && len(os.Args) < 3 {
		err = fmt.Errorf("no command")
	}
	if err != nil {
		fail(stepShim, err)
	}
	if spec.Dir != "" {
		if err := os.Chdir(spec.Dir); err != nil {
			fail(stepDir, err)
		}
	}
	report := shimReport{}
	var files []*os.File
	for _, family := range spec.Spare {
		if s, err := sys.StreamSocket(family); err == nil {
			files, report.Spare = append(files, s), append(report.Spare, family)
		}
	}
	if spec.Intercept {
		notify, err := intercept.Filter{Setsockopt: spec.Setsockopt}.Install()
		switch {
		case err == nil:
			files, report.Notify = append([]*os.File{notify}, files...), true
		case len(spec.Names) == 0:
			fail(stepFilter, err)
		default:
			// What it listens on was handed over, so it can do without.
			report.Text = err.Error()
		}
	}
	data, err := json.Marshal(report)
	if err == nil {
		err = sys.SendMessage(sock, data, files...)
	}
	var handed []*os.File
	if err == nil {
		_, handed, err = sys.ReceiveMessage(sock, buf)
	}
	closeAll(files)
	if err != nil {
		os.Exit(127)
	}
	first, env := sock, os.Environ()
	if len(handed) > 0 {
		env = append(env, "LISTEN_PID="+strconv.Itoa(os.Getpid()), "LISTEN_FDS="+strconv.Itoa(len(handed)),
			"LISTEN_FDNAMES="+strings.Join(spec.Names, ":"))
		if sock, err = sys.PlaceListenFDs(sock, handed); err != nil {
			fail(stepShim, err)
		}
	}
	err = syscall.Exec(os.Args[1], os.Args[2:], env)
	fail(stepExec, err)
	// Their finalizers would close descriptors that are the program's by now.
	runtime.KeepAlive(handed)
	runtime.KeepAlive(first)
}
