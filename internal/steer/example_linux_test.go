package steer_test

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/berth-net/berth/internal/steer"
	"github.com/berth-net/berth/internal/sys"
)

// Two generations listen on one port; new connections go to the first until the second is ready.
func ExampleGroup() {
	mode, _ := steer.Best()
	group, err := steer.NewGroup(mode)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer group.Close()

	listen := func(addr netip.AddrPort) *os.File {
		sock, err := sys.StreamSocket(sys.INET)
		if err == nil {
			err = sys.SetReusePort(sock, true)
		}
		if err == nil {
			err = sys.Bind(sock, sys.INET, addr)
		}
		if err == nil {
			err = sys.ListenOn(sock, 128)
		}
		if err != nil {
			panic(err)
		}
		return sock
	}
	old := listen(netip.MustParseAddrPort("127.0.0.1:0"))
	oldSlot, _ := group.Add(old)

	addr, _ := sys.LocalAddr(old)
	candidate := listen(addr)
	defer candidate.Close()
	candidateSlot, _ := group.Add(candidate) // gets no connection

	if err := group.Steer(candidateSlot); err != nil { // gets all
		fmt.Println(err)
	}
	if err := group.Remove(oldSlot); err != nil {
		fmt.Println(err)
	}
	old.Close()
	fmt.Println("steered")
	// Output: steered
}
